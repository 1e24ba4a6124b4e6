"""A viewer's page read back: what `view.js` reads, in NumPy."""

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"i16": "<i2", "u16": "<u2", "u32": "<u4", "u8": "<u1", "f32": "<f4"}
CALL: dict[str, Any] = {"height": 112, "width": 144, "num_inference_steps": 3, "max_sequence_length": 8}  # 7 × 9 tokens, 8 of text


@dataclass
class Page:
    """Its data, and their arrays."""

    data: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Page":
        (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
        return cls(json.loads(text))

    @property
    def views(self) -> list[dict[str, Any]]:
        return self.data["views"]

    @property
    def names(self) -> list[tuple[str, int, int]]:
        return [(view["layer"], view["head"], view["step"]) for view in self.views]

    def array(self, name: str) -> np.ndarray:
        kind, text = self.data["arrays"][name]
        return np.frombuffer(base64.b64decode(text), KINDS[kind])

    def layout(self, view: dict[str, Any]) -> dict[str, Any]:
        return self.data["layouts"][view["layout"]]

    def weights(self, view: dict[str, Any]) -> np.ndarray:
        """The softmax `[image, N]`."""
        q, k = (self.array(view[x]).reshape(-1, view["width"]) * self.array(view[f"{x}_scale"]).astype(float) for x in "qk")
        logits = view["scale"] * q @ k.T
        if view["bias"] is not None:
            bias, start = self.array(view["bias"]), self.layout(view)["text_start"]
            logits[:, start : start + len(bias)] += bias
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def kept(self, view: dict[str, Any]) -> np.ndarray:
        """Which pairs of the image's tokens are kept, `[image, image]`."""
        image = self.layout(view)["image"]
        if view["pairs"] is None:
            return np.ones((image, image), bool)
        pairs = view["pairs"]
        (q_block, q_place), (k_block, k_place) = (self._places(pairs[side]) for side in ("queries", "keys"))
        visits = self.array(pairs["visits"]).reshape(q_block.max() + 1, k_block.max() + 1)
        masks = self.array(pairs["masks"]).reshape(-1, max(1, pairs["mask_row"]), max(1, pairs["mask_bytes"]))
        found = visits[q_block][:, k_block].astype(int)
        masked = masks[np.maximum(found - 2, 0), q_place[:, None], k_place // 8] >> k_place % 8 & 1 if len(masks) else found
        return np.where(found < 2, found, masked).astype(bool)

    def _places(self, side: list[str]) -> tuple[np.ndarray, np.ndarray]:
        order, counts = map(self.array, side)
        block, place = np.zeros(len(order), int), np.zeros(len(order), int)
        block[order] = np.repeat(np.arange(len(counts)), counts)
        place[order] = np.concatenate([np.arange(count) for count in counts])
        return block, place

    def shares(self, view: dict[str, Any], name: str) -> np.ndarray:
        return self.array(view[name]) / 65535
