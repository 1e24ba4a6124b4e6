"use strict";
// The viewer of attention. Its data are in the page's element "data": see view_page.py, which writes them.

const KINDS = { i16: Int16Array, u16: Uint16Array, u32: Uint32Array, u8: Uint8Array, f32: Float32Array };
const MAGMA = [[0, 0, 4], [28, 16, 68], [79, 18, 123], [129, 37, 129], [181, 54, 122], [229, 80, 100], [251, 135, 97], [254, 194, 135], [252, 253, 191]];
const SIDE = 1024; // pixels of a canvas, about
const WHOLE = 1; // of `visits`: all of a pair of blocks is kept; above it, a mask says what

/** The array that a text of base64 contains, kept once it was read. */
function makeReader(arrays) {
  const read = new Map();
  return (name) => {
    if (name === null || name === undefined) return null;
    if (!read.has(name)) {
      const [kind, text] = arrays[name];
      const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      read.set(name, new KINDS[kind](bytes.buffer));
    }
    return read.get(name);
  };
}

/** Of tokens cut into blocks: each token's block and its place there. */
function blocksOf(order, counts) {
  const block = new Uint32Array(order.length), place = new Uint16Array(order.length);
  let next = 0;
  counts.forEach((count, number) => {
    for (let i = 0; i < count; i++, next++) {
      block[order[next]] = number;
      place[order[next]] = i;
    }
  });
  return { block, place };
}

/** The softmax over all keys of one query of the image: Float64Array, in the order of the sequence. */
function weightsOf(view, token) {
  const { q, k, width, qScale, kScale, bias, scale, textStart } = view;
  const count = k.length / width, own = new Float64Array(width), logits = new Float64Array(count);
  for (let d = 0; d < width; d++) own[d] = q[token * width + d] * qScale[d] * kScale[d] * scale;
  let top = -Infinity;
  for (let key = 0, at = 0; key < count; key++) {
    let sum = 0;
    for (let d = 0; d < width; d++, at++) sum += own[d] * k[at];
    if (bias && key >= textStart && key < textStart + bias.length) sum += bias[key - textStart];
    logits[key] = sum;
    if (sum > top) top = sum;
  }
  let total = 0;
  for (let key = 0; key < count; key++) total += logits[key] = Math.exp(logits[key] - top);
  for (let key = 0; key < count; key++) logits[key] /= total;
  return logits;
}

/** Which tokens of the image one of its queries keeps: Uint8Array. */
function keptOf(view, token) {
  const { pairs, image } = view, kept = new Uint8Array(image).fill(1);
  if (!pairs) return kept;
  const { queries, keys, visits, columns, masks, maskRow, maskBytes } = pairs;
  const row = queries.block[token] * columns, place = queries.place[token];
  for (let key = 0; key < image; key++) {
    const found = visits[row + keys.block[key]];
    if (found > WHOLE) {
      const bit = keys.place[key];
      kept[key] = (masks[((found - 2) * maskRow + place) * maskBytes + (bit >> 3)] >> (bit & 7)) & 1;
    } else kept[key] = found;
  }
  return kept;
}

/** How the mass of one query is shared: on text, on what is kept of the image, and on all else. */
function sharesOf(view, weights, kept) {
  let text = 0, image = 0, rest = 0;
  for (let key = 0; key < weights.length; key++) {
    const token = key - view.imageStart;
    if (token < 0 || token >= view.image) text += weights[key];
    else if (kept[token]) image += weights[key];
    else rest += weights[key];
  }
  return { text, image, rest };
}

/** The colour of a value from 0 to 1. */
function colourOf(value) {
  const at = Math.min(Math.max(value, 0), 1) * (MAGMA.length - 1), low = Math.min(Math.floor(at), MAGMA.length - 2);
  return MAGMA[low].map((part, i) => Math.round(part + (at - low) * (MAGMA[low + 1][i] - part)));
}

function percent(share) {
  const value = 100 * share;
  if (value === 0) return "0\u00a0%";
  return (value >= 9.95 ? value.toFixed(0) : value >= 0.095 ? value.toFixed(1) : value < 0.01 ? "<0.01" : value.toFixed(2)) + "\u00a0%";
}

/** A view of the page's data with its arrays read, in the form that the functions above take. */
function readView(data, read, number) {
  const view = data.views[number], grids = data.layouts[view.layout];
  const image = grids.image, cut = (side) => blocksOf(read(side[0]), read(side[1]));
  let pairs = null;
  if (view.pairs) {
    const { queries, keys, visits, masks, mask_row: maskRow, mask_bytes: maskBytes } = view.pairs;
    const same = queries[0] === keys[0] && queries[1] === keys[1], first = cut(queries);
    pairs = {
      queries: first, keys: same ? first : cut(keys), columns: read(keys[1]).length, visits: read(visits), masks: read(masks), maskRow, maskBytes,
    };
  }
  return {
    ...view, pairs, image, q: read(view.q), k: read(view.k), qScale: read(view.q_scale), kScale: read(view.k_scale), bias: read(view.bias),
    keptShare: read(view.kept), estimated: read(view.estimated), error: read(view.error), imageStart: grids.image_start, textStart: grids.text_start,
    grids: grids.grids,
  };
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent), read = makeReader(data.arrays);
  const byId = (id) => document.getElementById(id), unit = 65535; // of shares and errors kept as u16
  const grounds = new Map();
  const state = { view: null, grid: 0, frame: 0, row: 0, column: 0, weights: null, kept: null, under: null };
  const pictures = data.pictures.map((source) => {
    const picture = new Image();
    picture.src = source;
    picture.decode().then(draw, () => {});
    return picture;
  });

  /** The first token of the grid that is shown. */
  const gridStart = () => state.view.grids.slice(0, state.grid).reduce((sum, [t, h, w]) => sum + t * h * w, 0);
  const size = () => state.view.grids[state.grid];
  const frameStart = () => gridStart() + state.frame * size()[1] * size()[2];
  const token = () => frameStart() + state.row * size()[2] + state.column;

  function choose() {
    const chosen = {};
    for (const name of ["layer", "head", "step"]) chosen[name] = byId(name).value;
    const number = data.views.findIndex((v) => v.layer === chosen.layer && String(v.head) === chosen.head && String(v.step) === chosen.step);
    byId("absent").hidden = number >= 0;
    if (number < 0) return;
    const first = state.view === null;
    state.view = readView(data, read, number);
    const grids = state.view.grids;
    if (state.grid >= grids.length) state.grid = 0;
    byId("grid-field").hidden = grids.length < 2;
    byId("grid").replaceChildren(...grids.map((_, i) => new Option(i ? `image ${i + 1}` : "drawn", i, false, i === state.grid)));
    if (first) [state.frame, state.row, state.column] = size().map((n) => n >> 1);
    byId("ran").textContent = `${state.view.method}, noise level ${state.view.noise.toFixed(2)}`;
    move(0, 0, 0);
  }

  function move(frames, rows, columns) {
    const [t, h, w] = size(), within = (value, count) => Math.min(Math.max(value, 0), count - 1);
    state.frame = within(state.frame + frames, t);
    state.row = within(state.row + rows, h);
    state.column = within(state.column + columns, w);
    byId("frame-field").hidden = t < 2;
    byId("frame").max = t - 1;
    byId("frame").value = state.frame;
    byId("frame-number").textContent = `${state.frame + 1} of ${t}`;
    state.weights = weightsOf(state.view, token());
    state.kept = keptOf(state.view, token());
    draw();
    tell();
    point();
  }

  /** The picture of the frame that is shown in this size, drawn once; of references there is none. */
  function ground(width, height, grey) {
    const picture = state.grid === 0 ? pictures[state.frame] : undefined, ready = picture && picture.complete && picture.naturalWidth > 0;
    const name = [ready ? state.frame : "none", width, height, grey].join();
    if (!grounds.has(name)) {
      const made = document.createElement("canvas"), context = made.getContext("2d");
      made.width = width;
      made.height = height;
      context.fillStyle = "#777";
      context.fillRect(0, 0, width, height);
      context.filter = grey ? "grayscale(1)" : "none";
      if (ready) context.drawImage(picture, 0, 0, width, height);
      grounds.set(name, made);
    }
    return grounds.get(name);
  }

  /** Fill a canvas: the picture, what `paint` gives each token ([red, green, blue, alpha]), and the token that is chosen. */
  function board(canvas, paint, edges, grey) {
    const [, h, w] = size(), cell = Math.max(1, Math.round(SIDE / Math.max(h, w))), context = canvas.getContext("2d");
    canvas.width = w * cell;
    canvas.height = h * cell;
    context.drawImage(ground(canvas.width, canvas.height, grey), 0, 0);
    const layer = document.createElement("canvas"), pixels = new ImageData(w, h), from = frameStart();
    layer.width = w;
    layer.height = h;
    for (let i = 0; i < h * w; i++) pixels.data.set(paint(from + i), 4 * i);
    layer.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(layer, 0, 0, canvas.width, canvas.height);
    if (edges) outline(context, edges, from, h, w, cell);
    mark(context, cell);
  }

  /** Lines where what is kept meets what is not. */
  function outline(context, kept, from, h, w, cell) {
    context.beginPath();
    for (let y = 0; y < h; y++) {
      for (let x = 0; x < w; x++) {
        const own = kept[from + y * w + x];
        if (x + 1 < w && own !== kept[from + y * w + x + 1]) {
          context.moveTo((x + 1) * cell, y * cell);
          context.lineTo((x + 1) * cell, (y + 1) * cell);
        }
        if (y + 1 < h && own !== kept[from + (y + 1) * w + x]) {
          context.moveTo(x * cell, (y + 1) * cell);
          context.lineTo((x + 1) * cell, (y + 1) * cell);
        }
      }
    }
    context.lineWidth = 3;
    context.strokeStyle = "#4cc9f0";
    context.stroke();
  }

  function mark(context, cell) {
    const side = Math.max(cell, 14), x = (state.column + 0.5) * cell - side / 2, y = (state.row + 0.5) * cell - side / 2;
    for (const [colour, width] of [["#000", 8], ["#fff", 4]]) {
      context.lineWidth = width;
      context.strokeStyle = colour;
      context.strokeRect(x, y, side, side);
    }
  }

  function draw() {
    const { view, weights, kept } = state;
    if (!view || !weights) return;
    const shown = byId("shown").value, all = { mass: view.keptShare, error: view.error }[shown];
    if (all) {
      const top = all.reduce((a, b) => Math.max(a, b), 0) || 1, low = shown === "mass" ? all.reduce((a, b) => Math.min(a, b), unit) : 0;
      board(byId("left"), (i) => [...colourOf((all[i] - low) / (top - low || 1)), 215], null, true);
      legend("left-legend", percent(low / unit), percent(top / unit));
    } else {
      const shade = view.rest ? 165 : 225;
      board(byId("left"), (i) => (kept[i] ? [0, 0, 0, 0] : [8, 10, 18, shade]), kept, false);
      byId("left-legend").replaceChildren(key("clear", "kept exactly"), key(view.rest ? "shaded" : "black", view.rest ? "estimated" : "lost"));
    }
    let top = 0;
    for (let i = 0; i < view.image; i++) top = Math.max(top, weights[view.imageStart + i]);
    board(byId("right"), (i) => [...colourOf(Math.sqrt(weights[view.imageStart + i] / top)), 225], null, true);
    legend("right-legend", "0", percent(top) + " (square-root scale)");
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function key(kind, words) {
    const made = element("span", "key");
    made.append(element("i", kind), words);
    return made;
  }

  function legend(id, low, high) {
    byId(id).replaceChildren(element("span", "", low), element("i", "ramp"), element("span", "", high));
  }

  /** The numbers of the token that is chosen, and its text. */
  function tell() {
    const { view, weights, kept } = state, shares = sharesOf(view, weights, kept), now = token();
    const picture = size()[0] > 1 ? "video" : "picture";
    const names = [["image", `${picture}, kept`], ["rest", `${picture}, ${view.rest ? "estimated" : "lost"}`]];
    if (weights.length > view.image) names.unshift(["text", "text, kept"]);
    byId("bar").replaceChildren(
      ...names.map(([name]) => {
        const part = element("span", name === "rest" && !view.rest ? "lost" : name);
        part.style.flexGrow = shares[name];
        return part;
      }),
    );
    byId("shares").replaceChildren(
      ...names.map(([name, words]) => {
        const item = element("li", "");
        item.dataset.share = shares[name];
        item.dataset.name = name;
        item.append(element("i", name === "rest" && !view.rest ? "lost" : name), element("b", "", percent(shares[name])), ` ${words}`);
        return item;
      }),
    );
    const frame = size()[0] > 1 ? `frame ${state.frame + 1}, ` : "";
    byId("where").textContent = `Token at ${frame}row ${state.row + 1}, column ${state.column + 1}`;
    const notes = [`${percent(kept.reduce((a, b) => a + b, 0) / view.image)} of the ${picture}’s tokens are kept for it.`];
    if (view.estimated) notes.push(`The method itself gives ${percent(view.estimated[now] / unit)} to what it estimates.`);
    notes.push(`Its output errs ${percent(view.error[now] / unit)}${view.error[now] === unit ? " or more" : ""} of its size.`);
    byId("notes").textContent = notes.join(" ");
    const rows = textRows(view, weights), top = Math.max(...rows.map((row) => row.mass), 0.01); // less than 1 % in all is drawn as little
    byId("text-field").hidden = rows.length === 0;
    byId("text").replaceChildren(
      ...rows.map((row) => {
        const item = element("li", ""), bar = element("span", "mass");
        bar.style.width = `${(100 * row.mass) / top}%`;
        const track = element("span", "track");
        track.append(bar);
        item.append(element("span", "word", row.words), track, element("span", "number", percent(row.mass)));
        return item;
      }),
    );
  }

  /** The weight of the token that was pointed at last. */
  function point() {
    const [row, column] = state.under || [], at = frameStart() + row * size()[2] + column;
    if (!(at < state.view.image)) return; // nothing was, or it was in a larger image
    const fate = state.kept[at] ? "kept" : state.view.rest ? "estimated" : "lost";
    byId("under").textContent = `Row ${row + 1}, column ${column + 1}: ${percent(state.weights[state.view.imageStart + at])} of the mass, ${fate}`;
  }

  /** Text tokens that follow each other with one label, as padding, are one row. */
  function textRows(view, weights) {
    const rows = [], count = weights.length - view.image, labels = view.labelled ? data.text : null;
    for (let i = 0; i < count; i++) {
      const words = labels ? labels[i] : `token ${i + 1}`, mass = weights[view.textStart + i], last = rows[rows.length - 1];
      if (last && labels && last.label === words) {
        last.mass += mass;
        last.count += 1;
        last.words = `${words} × ${last.count}`;
      } else rows.push({ label: words, words, mass, count: 1 });
    }
    return rows;
  }

  function pointed(event) {
    const canvas = event.currentTarget, box = canvas.getBoundingClientRect(), [, h, w] = size();
    const along = (at, length, count) => Math.min(Math.max(Math.floor((at / length) * count), 0), count - 1);
    return [along(event.clientY - box.top, box.height, h), along(event.clientX - box.left, box.width, w)];
  }

  for (const id of ["left", "right"]) {
    const canvas = byId(id);
    canvas.addEventListener("pointerdown", (event) => {
      [state.row, state.column] = pointed(event);
      move(0, 0, 0);
    });
    canvas.addEventListener("pointermove", (event) => {
      const [row, column] = pointed(event);
      if (event.buttons & 1) {
        [state.row, state.column] = [row, column];
        move(0, 0, 0);
      }
      state.under = [row, column];
      point();
    });
    canvas.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 8 : 1, [t, h, w] = size();
      const steps = {
        ArrowUp: [0, -far, 0], ArrowDown: [0, far, 0], ArrowLeft: [0, 0, -far], ArrowRight: [0, 0, far],
        Home: [0, 0, -w], End: [0, 0, w], PageUp: [t > 1 ? -1 : 0, t > 1 ? 0 : -h, 0], PageDown: [t > 1 ? 1 : 0, t > 1 ? 0 : h, 0],
      }[event.key];
      if (!steps) return;
      event.preventDefault();
      move(...steps);
    });
  }
  for (const id of ["layer", "head", "step"]) byId(id).addEventListener("change", choose);
  byId("shown").addEventListener("change", draw);
  byId("grid").addEventListener("change", () => {
    state.grid = Number(byId("grid").value);
    move(0, 0, 0);
  });
  byId("frame").addEventListener("input", () => move(Number(byId("frame").value) - state.frame, 0, 0));
  byId("worst").addEventListener("click", () => {
    const [, h, w] = size(), error = state.view.error, from = gridStart();
    let worst = from;
    for (let i = from; i < from + size()[0] * h * w; i++) if (error[i] > error[worst]) worst = i;
    const at = worst - from;
    [state.frame, state.row, state.column] = [Math.floor(at / (h * w)), Math.floor(at / w) % h, at % w];
    move(0, 0, 0);
  });
  document.body.classList.add("live");
  choose();
}

if (typeof document !== "undefined") start();
