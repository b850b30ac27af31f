"""dParallel's entropy rule on pydecode (czg1225/dParallel, LLaDA/generate.py, 2ca4d14)."""

from torch import Tensor

from .transfer import confidence_of, counts, transfer


def get_transfer_index_entropy(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Tensor | int | None,
    entropy_threshold: float | None = None,
    *,
    mask_id: int | None = 126336,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """dParallel's proposals, and which to take: {H <= entropy_threshold} and always the lowest H.

    Replaces ``get_transfer_index_entropy``, which makes an fp64 softmax and its logarithm of all
    rows, and reads the device once a candidate. Arguments and results as
    ``fast_dllm.get_transfer_index``; without a threshold the ``num_transfer_tokens`` of lowest
    entropy are taken. H is in nats, of the untempered law, without theirs' 1e-12 in the logarithm.
    With ``remasking="random"`` a uniform draw stands for H.

    Raises:
        NotImplementedError: an unknown ``remasking``.
    """
    random = confidence_of(remasking) == "random"
    if entropy_threshold is None:
        rule = dict(rule="top_k", k=counts(num_transfer_tokens), min_commit=0)
    elif random:  # 1 - u is drawn like u: u <= threshold in their words
        rule = dict(rule="threshold", threshold=1 - entropy_threshold)
    else:
        rule = dict(rule="entropy", threshold=entropy_threshold)
    x0, step = transfer(
        logits,
        mask_index,
        x,
        temperature=temperature,
        remasking=remasking,
        mask_id=mask_id,
        seed=seed,
        offset=offset,
        confidence="neg_entropy",
        **rule,
    )
    return x0, step.committed
