"""Where each parameter of a `Decoder` lies in a Hugging Face checkpoint, as data. Reads nothing; knows no torch."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Source:
    """The stored tensor `name`; `transposed`: matrices lie as (in, out); `part` of `parts` equal pieces of the output.

    In a `WeightNames` table `name` is a module with `*` for the layer; after `WeightNames.locate` it is a tensor.
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a parameter of `shape`."""
        whole = (shape[0] * self.parts, *shape[1:])
        return whole[::-1] if self.transposed else whole

    def stored_index(self, shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where the part `index` of a parameter of `shape` lies in the file; every slice has a start and a stop."""
        offset = self.part * shape[0]
        moved = (slice(index[0].start + offset, index[0].stop + offset), *index[1:])
        return moved[::-1] if self.transposed else moved


@dataclass(frozen=True, slots=True)
class WeightNames:
    """One family's table: our module name -> where it is stored, below `prefix`. `ignored`: a pattern of stored tensors
    that carry no weights (buffers of older transformers)."""

    prefix: str
    modules: Mapping[str, Source]
    ignored: str

    def locate(self, parameter: str, *, tied: bool, stored: Collection[str]) -> Source:
        """`parameter`: a name of `Decoder.named_parameters()`; `stored`: the names of all tensors in the checkpoint.

        A tied head is the embedding; a checkpoint that stores only the head of the two is read all the same.
        Checkpoints of the bare model, without the head, have no prefix.
        """
        module, _, kind = parameter.rpartition(".")
        prefix = self.prefix if any(name.startswith(self.prefix) for name in stored) else ""
        embedding = f"{prefix}{self.modules['embed_tokens'].name}.{kind}"
        if tied and module in ("embed_tokens", "lm_head"):
            return Source("lm_head.weight" if embedding not in stored and "lm_head.weight" in stored else embedding)
        if module == "lm_head":
            return Source(parameter)
        layer = _LAYER.match(module)
        source = self.modules[_LAYER.sub("layers.*.", module)]
        name = source.name.replace("*", layer[1]) if layer else source.name
        return replace(source, name=f"{prefix}{name}.{kind}")

    def is_ignored(self, stored_name: str) -> bool:
        return re.fullmatch(self.ignored, stored_name) is not None
