"""A step's progress, as a run would tell it."""

from rayllm.train.progress import Progress


def progress(step: int, loss: float, *, steps: int = 9, pid: int = 1, **measures: float) -> Progress:
    return Progress(
        step=step,
        steps=steps,
        loss=loss,
        measures=measures,
        grad_norm=1.5,
        learning_rate=1e-4,
        count=100 + step,
        tokens_per_second=64.0,
        flops_per_second=5e9,
        mfu=None,
        matmul_share=0.25,
        seconds=2.0,
        memory_bytes=3_000_000_000,
        pid=pid,
    )
