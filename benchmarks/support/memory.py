"""What a step of training an OPT needs in memory and arithmetic, from its configuration alone.

Bytes are those of the tensors that PyTorch allocates; an allocator holds more. What autograd saves
is counted by operation, from the code of transformers' OPT with SDPA, whose kernels keep no scores.
memory_peaks.py compares it with what was allocated.
"""

from dataclasses import dataclass
from typing import Any

FLOAT, HALF = 4, 2  # bytes; bf16 computes under autocast, with float32 weights
ADAM = 2 * FLOAT  # both moments


@dataclass(frozen=True)
class Step:
    """How a step is taken.

    Args:
        batch, tokens: rows of a device, and their length.
        lora_rank: of adapters on all Linear modules but the head; 0 trains the model.
        devices: that FSDP2 shards parameters, gradients and moments over, block by block.
        fused_dropout: keeps a byte for each element, as on a GPU; on a CPU a number.
    """

    batch: int
    tokens: int
    bf16: bool = False
    attached: bool = False
    checkpoints: bool = False
    lora_rank: int = 0
    devices: int = 1
    fused_dropout: bool = True

    @property
    def width(self) -> int:
        """The bytes of a number that a Linear returns."""
        return HALF if self.bf16 else FLOAT

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


@dataclass(frozen=True)
class Parameters:
    """Counts of an OPT's parameters.

    Args:
        block: of one of its layers; weights are those of its Linear modules, without bias.
        table: of the embeddings, which the head shares.
        others: positions, projections, the last norm.
        adapters: of all layers.
    """

    layers: int
    block: int
    block_weights: int
    table: int
    others: int
    adapters: int

    @property
    def all(self) -> int:
        return self.layers * self.block + self.table + self.others


def parameters(config: Any, lora_rank: int = 0) -> Parameters:
    """Count the parameters of OPTForCausalLM, and of adapters on its Linear modules."""
    h, f, e = config.hidden_size, config.ffn_dim, config.word_embed_proj_dim
    weights = 4 * h * h + 2 * h * f
    projections = 2 * e * h if e != h else 0
    last_norm = 2 * h if config.do_layer_norm_before else 0
    sides = 4 * (h + h) + 2 * (h + f)  # a matrix for the input and one for the output
    adapters = config.num_hidden_layers * sides + (2 * (e + h) if e != h else 0)
    return Parameters(
        layers=config.num_hidden_layers,
        block=weights + 4 * h + f + h + 4 * h,
        block_weights=weights,
        table=config.vocab_size * e,
        others=(config.max_position_embeddings + 2) * h + projections + last_norm,
        adapters=lora_rank * adapters,
    )


def saved_by_block(config: Any, step: Step) -> int:
    """Return the bytes that a layer keeps for its backward, without QuantTune."""
    h, f, low = config.hidden_size, config.ffn_dim, step.width
    norms = 2 * h * FLOAT  # their inputs: sums of the residual stream, which stays float32
    # q, k and v share one input in float32; autocast makes a copy for each of them
    inputs = 4 * h * HALF if step.bf16 else 2 * h * FLOAT
    attention = 4 * h * low + 4 * config.num_attention_heads  # q, k, v, output; logsumexp
    feed_forward = f * low  # ReLU's result is the input of the second Linear
    dropout = 2 * h * (1 if step.fused_dropout else low)
    adapters = 6 * step.lora_rank * low
    if step.lora_rank and step.bf16:  # inputs that are bfloat16 go through float32 into a copy
        adapters += (h + f) * HALF
    statistics = 4 * FLOAT  # of two norms
    return step.rows * (norms + inputs + attention + feed_forward + dropout + adapters + statistics)


def kept_by_taps(config: Any, step: Step) -> int:
    """Return the bytes of a layer that are kept because they are observed, and for no other reason.

    The outputs of four Linear modules: q before it is scaled, out_proj, fc1, fc2. Under autocast
    those of the norms as well, of which a plain step keeps copies only.
    """
    h, f = config.hidden_size, config.ffn_dim
    norms = 2 * h * FLOAT if step.bf16 else 0
    return step.rows * ((3 * h + f) * step.width + norms)


def observed(config: Any, step: Step) -> int:
    """Return the bytes of all tensors that are observed."""
    h, f, low = config.hidden_size, config.ffn_dim, step.width
    block = 4 * h * FLOAT + (6 * h + 2 * f) * low
    return step.rows * config.num_hidden_layers * block


@dataclass(frozen=True)
class Need:
    """Bytes on a device: what is there all along, and the most that a moment adds to it.

    Args:
        state: parameters and moments, or the device's share of them.
        gradients: of all that is trained.
        activations: kept for the backward when it begins, logits apart.
        logits: at the same moment.
        block: to go back through one layer.
        moments: all that is there, by moment of the step.
    """

    state: int
    gradients: int
    activations: int
    logits: int
    block: int
    moments: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.moments.values())


def need(config: Any, step: Step) -> Need:
    """Return what a step of AdamW needs, after the first, which has no moments yet."""
    counts = parameters(config, step.lora_rank)
    trained = counts.adapters or counts.all
    state = (FLOAT * (counts.all + counts.adapters) + ADAM * trained) // step.devices
    gradients = FLOAT * trained // step.devices
    of_layer = 0 if step.lora_rank else FLOAT * counts.block // step.devices
    table = 0 if step.lora_rank else FLOAT * counts.table
    gathered = _gathered(counts, step)
    saved = saved_by_block(config, step)
    if step.attached:
        saved += kept_by_taps(config, step)
    # autocast's copies of weights go with the layers' graph; those of a shard with the layer
    casts = HALF * counts.block_weights if step.bf16 and step.devices == 1 else 0
    stream = step.rows * config.hidden_size * FLOAT
    kept = counts.layers * (stream if step.checkpoints else saved + casts)
    activations = kept + 2 * stream + (HALF * counts.table if casts else 0)
    # of a layer that is gone back through: what is computed again, and the widest gradients
    block = step.rows * (config.ffn_dim + config.hidden_size) * step.width
    if step.checkpoints:
        block += saved + casts
    scores = step.rows * config.vocab_size
    # float32 logits, their log-softmax and two gradients; in bf16 the forward has them twice
    cached = counts.layers * casts if step.checkpoints and not step.lora_rank else 0
    around = state + gathered
    moments = {
        "loss": around + activations + cached + scores * (2 * FLOAT + (HALF if step.bf16 else 0)),
        "backward begins": around + activations + scores * 3 * FLOAT,
        "last layer": around + activations + table + block,
        "first layer": around + gradients - of_layer + block,
        # the embeddings' gradient beside the head's; autocast's is a copy, to which it is added
        "embeddings": around + gradients + table * (1 if step.bf16 else 2),
    }
    return Need(state, gradients, activations, 3 * FLOAT * scores, block, moments)


def _gathered(counts: Parameters, step: Step) -> int:
    """Return what FSDP2 has whole: two layers, the root's parameters, a layer's gradients."""
    if step.devices == 1:
        return 0
    root = counts.all - counts.layers * counts.block
    gradients = 0 if step.lora_rank else counts.block
    return step.width * (2 * counts.block + root) + FLOAT * gradients


def operations(config: Any, step: Step) -> int:
    """Return the floating-point operations of a step, those of causal attention in full.

    2 for each weight and token in the forward; twice as many in the backward, of which LoRA needs
    half; checkpoints repeat the layers' forward.
    """
    counts = parameters(config, step.lora_rank)
    scores = 4 * config.hidden_size * step.tokens  # of a token: q k and its product with v
    layers = counts.layers * (2 * counts.block_weights + scores) * step.rows
    head = 2 * counts.table * step.rows
    passes = 2 if step.lora_rank else 3
    return passes * (layers + head) + (layers if step.checkpoints else 0)
