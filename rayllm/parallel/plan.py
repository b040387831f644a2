"""Which weight is split how over the tensor ranks, as data. Knows no process group and holds no tensor.

Megatron's layout (Shoeybi et al. 2019): projections into heads and into the ffn are split by output ("column"), those
back by input ("row"), so that each attention and each MLP needs one sum over the ranks. Vocabulary matrices are split
by token. Whatever is not named is the same on every rank.
"""

from collections.abc import Mapping
from enum import StrEnum

from rayllm.core.errors import ConfigError
from rayllm.models.spec import DecoderSpec


class Style(StrEnum):
    COLUMN = "column"
    KV_COLUMN = "kv_column"  # by kv head; a head is held by several ranks where there are more ranks than heads
    ROW = "row"  # the bias is whole on every rank, and added once, after the sum
    VOCAB = "vocab"  # padded to the same number of tokens on every rank


TENSOR_PLAN: Mapping[str, Style] = {
    "embed_tokens": Style.VOCAB,
    "lm_head": Style.VOCAB,
    "self_attn.q_proj": Style.COLUMN,
    "self_attn.k_proj": Style.KV_COLUMN,
    "self_attn.v_proj": Style.KV_COLUMN,
    "self_attn.o_proj": Style.ROW,
    "mlp.gate_proj": Style.COLUMN,
    "mlp.up_proj": Style.COLUMN,
    "mlp.down_proj": Style.ROW,
}


def style_of(module: str) -> Style | None:
    """`module`: a name such as layers.3.self_attn.q_proj; None: whole on every rank."""
    return TENSOR_PLAN.get(".".join(module.split(".")[-2:]))


def check_layout(spec: DecoderSpec, tp: int, pp: int) -> None:
    """Raises ConfigError where the model cannot be split so; needs no weights."""
    if pp > spec.num_layers:
        raise ConfigError(f"pipeline parallel size {pp} is more than the model's {spec.num_layers} layers")
    if spec.num_heads % tp:
        raise ConfigError(f"tensor parallel size {tp} does not divide the model's {spec.num_heads} attention heads")
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        raise ConfigError(
            f"tensor parallel size {tp} neither divides the model's {spec.num_kv_heads} key/value heads"
            " nor is a multiple of them"
        )
    if spec.ffn_size % tp:
        raise ConfigError(f"tensor parallel size {tp} does not divide the model's ffn size {spec.ffn_size}")


def local_kv_heads(spec: DecoderSpec, tp: int) -> int:
    return max(1, spec.num_kv_heads // tp)


def local_vocab_size(spec: DecoderSpec, tp: int) -> int:
    """Tokens that each rank holds, padding included."""
    return -(-spec.vocab_size // tp)


def stage_layers(num_layers: int, pp_rank: int, pp_size: int) -> range:
    """The earliest stages take one layer more where they do not divide: the last one has the head to compute."""
    size, extra = divmod(num_layers, pp_size)
    start = pp_rank * size + min(pp_rank, extra)
    return range(start, start + size + (pp_rank < extra))


def local_index(
    style: Style | None, shape: tuple[int, ...], spec: DecoderSpec, *, tp_rank: int, tp_size: int
) -> tuple[slice, ...]:
    """The part of a whole parameter of `shape` that a rank holds, without padding (which may leave it empty)."""
    index = [slice(0, size) for size in shape]
    match style:
        case Style.COLUMN:
            index[0] = _equal_part(shape[0], tp_rank, tp_size)
        case Style.KV_COLUMN:
            # Rank r of `tp_size` holds query heads from r * H / tp_size on, which read kv head r * K // tp_size.
            first = tp_rank * spec.num_kv_heads // tp_size
            index[0] = slice(first * spec.head_dim, (first + local_kv_heads(spec, tp_size)) * spec.head_dim)
        case Style.ROW if len(shape) == 2:
            index[1] = _equal_part(shape[1], tp_rank, tp_size)
        case Style.VOCAB:
            size = local_vocab_size(spec, tp_size)
            index[0] = slice(min(tp_rank * size, shape[0]), min((tp_rank + 1) * size, shape[0]))
    return tuple(index)


def _equal_part(size: int, rank: int, ranks: int) -> slice:
    return slice(rank * size // ranks, (rank + 1) * size // ranks)
