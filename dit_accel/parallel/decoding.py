"""`shared_decoding`: the processes that share a picture share the tiles of its decoding, too."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dit_accel.errors import DecodingError, UnsupportedModelError
from dit_accel.parallel.ranks import Ranks

# whose `tiled_decode` calls the decoder once for each tile, with nothing but the tile, and blends what comes out
CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2")


@contextlib.contextmanager
def shared_decoding(pipe: Any) -> Iterator[None]:
    """A `with` block in which each process decodes its share of an autoencoder's tiles, where the pipeline's transformer is spread over
    several; all get the whole picture.

    The autoencoder must work in tiles (`pipe.vae.enable_tiling()`): what is not in tiles, or requires a gradient, is decoded
    by each process as ever. Every process must call the pipeline alike. The pixels are those of one process. Raises UnsupportedModelError
    for an autoencoder whose tiles depend on each other or are unknown; the call raises DecodingError, which names the process, where
    another one could not decode its tiles. Within another such block it changes nothing.
    """
    ranks = Ranks.of(getattr(pipe.transformer, "_parallel_config", None))
    if ranks is None or isinstance(getattr(pipe.vae, "tiled_decode", None), _Shared):
        yield
        return
    vae = pipe.vae
    if not shares_tiles(vae):
        raise UnsupportedModelError(
            f"the tiles of {type(vae).__name__} can't be decoded by several processes: leave shared_decoding out, and each decodes all; "
            f"it knows {' and '.join(CLASSES)}"
        )
    with _replaced(vae, "tiled_decode", _Shared(vae, vae.tiled_decode, ranks)):
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A function in the place of a module's, its class's or its own as that of an offloaded model, for the length of a `with` block."""
    own = vars(module)
    before = {name: own[name]} if name in own else {}
    own[name] = function
    try:
        yield
    finally:
        del own[name]
        own.update(before)


def shares_tiles(vae: Any) -> bool:
    """Whether the tiles of an autoencoder can be decoded by several processes."""
    return type(vae).__name__ in CLASSES


class _Shared:
    """`tiled_decode` of an autoencoder in its place: the tiles are cut without being decoded, each is decoded by one process and sent to
    all, and they are put together as ever."""

    def __init__(self, vae: Any, original: Callable[..., Any], ranks: Ranks) -> None:
        self.vae, self.original, self.ranks = vae, original, ranks

    def __call__(self, z: Tensor, return_dict: bool = True) -> Any:
        if torch.is_grad_enabled() and z.requires_grad:
            return self.original(z, return_dict=return_dict)
        decoded, dtype = self._agreed(z)
        for number, pixels in enumerate(decoded):
            owner = dist.get_global_rank(self.ranks.group, self._owner(number))
            decoded[number] = pixels = pixels.to(dtype).contiguous()
            dist.broadcast(pixels, owner, group=self.ranks.group)
        remaining = iter(decoded)
        with _replaced(self.vae.decoder, "forward", lambda tile: next(remaining)):
            return self.original(z, return_dict=return_dict)

    def _agreed(self, z: Tensor) -> tuple[list[Tensor], torch.dtype]:
        """`_decoded`, and the dtype of the pixels, under autocast not that of a tile.

        No rank waits for pixels before all ranks have theirs: one that failed raises its own error, the others a DecodingError.
        """
        decoded: list[Tensor] = []
        failure: Exception | None = None
        try:
            decoded = self._decoded(z)
        except Exception as error:
            failure = error
            traceback.clear_frames(error.__traceback__)  # their tensors: after one that ran out of memory the message requires some
        said = None if failure is None else f"{type(failure).__name__}: {failure}"
        answers = self.ranks.all_of((decoded[0].dtype if decoded else z.dtype, said))
        if failure is not None:
            raise failure
        for rank, (_, words) in enumerate(answers):
            if words is not None:
                raise DecodingError(f"process {rank} of {self.ranks.size} could not decode its tiles, so none has the picture: {words}")
        return decoded, answers[0][0]  # the first rank has the first tile

    def _decoded(self, z: Tensor) -> list[Tensor]:
        """The pixels of this rank's tiles, and room for those of the others'."""
        tiles: list[Tensor] = []

        def cut(tile: Tensor) -> Tensor:
            tiles.append(tile)
            return self._empty(tile)

        with _replaced(self.vae.decoder, "forward", cut):
            self.original(z)
        return [self.vae.decoder(x) if self._owner(n) == self.ranks.rank else self._empty(x) for n, x in enumerate(tiles)]

    def _owner(self, number: int) -> int:
        return number % self.ranks.size

    def _empty(self, tile: Tensor) -> Tensor:
        """Room for a tile's pixels."""
        config = self.vae.config
        times = 2 ** (len(config.block_out_channels) - 1)
        return tile.new_zeros(tile.shape[0], config.out_channels, tile.shape[2] * times, tile.shape[3] * times)
