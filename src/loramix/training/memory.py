"""The memory of a training, before it starts: parameters exactly, activations as an estimate.

H: hidden size. V: vocabulary. L: adapted layers. E: experts. R: total rank of an adapted layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedModel

from loramix.config.xlora import XLoraConfig
from loramix.experts.base_model import blocks_of, vocabulary_of
from loramix.routers import RouterSizes, router_class

TRAINED = 16  # bytes of a trained parameter: float32, its gradient, and Adam's two moments
SAVED = 24  # · H numbers that backward needs for each token and block of a frozen base (a Llama's, rounded up)
LOGITS = 12  # bytes for each token and entry of the vocabulary: float32 logits, their softmax and its gradient


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters by part, and the sizes that activations grow with.

    Args:
        base: parameters of the base model.
        root: of them, those outside its blocks: embeddings and head.
        experts: parameters of all experts.
        new: of them, those of experts that are new, which train in any case.
        router: parameters of the classifier.
        ranks: ΣR over the adapted layers.
        hidden: H.
        blocks: of the base model.
        vocabulary: V.
        itemsize: bytes of a number of the base model's dtype.
    """

    base: int
    root: int
    experts: int
    router: int
    ranks: int
    hidden: int
    blocks: int
    vocabulary: int
    itemsize: int
    new: int = 0


def sizes_of(
    base: PreTrainedModel, config: XLoraConfig, router: RouterSizes, *, experts: int, ranks: int, new: int = 0
) -> Sizes:
    """The sizes of a base model and a mixture.

    Args:
        base: the base model, which may be without weights (on the meta device).
        config: the mixture's, complete.
        router: what its router is built for.
        experts: parameters of all experts.
        ranks: ΣR over the adapted layers.
        new: parameters of the experts that are new.
    """
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    root = {id(p): p.numel() for module in ends if module is not None for p in module.parameters()}
    return Sizes(
        base=base.num_parameters(),
        root=sum(root.values()),
        experts=experts,
        router=sum(map(math.prod, router_class(config).shapes(config, router).values())),
        ranks=ranks,
        hidden=config.hidden_size,
        blocks=blocks_of(base.config),
        vocabulary=vocabulary_of(base.config),
        itemsize=base.dtype.itemsize,
        new=new,
    )


def training_memory(
    sizes: Sizes, *, tokens: int, experts_train: bool = False, checkpointing: bool = False, shards: int = 1
) -> dict[str, int]:
    """Bytes of one process, by purpose.

    Args:
        sizes: those of base model and mixture.
        tokens: the number of tokens in the batch of this process.
        experts_train: whether the experts that exist train too.
        checkpointing: whether activations are recomputed in backward, block by block.
        shards: processes among which FSDP2 divides the parameters; 1 for one process, and for each of DDP's.
    """
    width = sizes.hidden * sizes.itemsize
    blocks = width * (sizes.blocks + SAVED) if checkpointing else width * SAVED * sizes.blocks
    low_rank = sizes.ranks * sizes.itemsize // (sizes.blocks if checkpointing else 1)
    trained = sizes.experts if experts_train else sizes.new
    beside = 4 if sizes.new else sizes.itemsize  # frozen experts are float32 beside those that train
    memory = {
        "base model": sizes.base * sizes.itemsize // shards,
        "experts": (trained * TRAINED + (sizes.experts - trained) * beside) // shards,
        "router, its gradients and Adam's moments": sizes.router * TRAINED // shards,
        "activations of one batch (estimate)": tokens * (blocks + low_rank + LOGITS * sizes.vocabulary),
    }
    if shards > 1:
        block = (sizes.base - sizes.root + sizes.experts) // sizes.blocks
        memory["gathered: embeddings, head and two blocks"] = (sizes.root + 2 * block) * sizes.itemsize
    return memory
