"""The fields of a run as frozen dataclasses; field docstrings are the help text.

Values derived from them (local batch, resolved learning rate) are methods and never stored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Literal

Arch = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext50_32x4d",
    "resnext50_32x8d",
    "resnet50_w2x",
    "resnet50_w4x",
]
Mechanism = Literal["queue", "end_to_end", "memory_bank"]
ShuffleBN = Literal["auto", "all_to_all", "loader", "split", "none"]


class ConfigError(ValueError):
    """A configuration or input that cannot train. The message is one sentence for the user."""


class OneRankError(ConfigError):
    """One that this rank alone may have met in the middle of a run, so that no other says it."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, how long it may be silent, and on what it runs."""

    dir: str = "runs/moco"
    """Run directory: configuration, metrics, TensorBoard events, checkpoints and pictures."""
    seed: int = 0
    """Seed of the sample order, of every augmentation, of shuffle-BN and of the initial weights."""
    resume: str = "auto"
    """`auto` continues from the latest checkpoint in `run.dir`; `never` refuses one; or the path of
    a checkpoint, ours or the official trainer's, to go on from until `run.dir` has its own."""
    resume_changes: Literal["refuse", "allow"] = "refuse"
    """`allow` resumes with other settings than before, such as more epochs, and lists them."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes CUDA where there is a device."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type of the encoders; weights stay fp32. `auto`: bf16 where the device multiplies it
    (CUDA from sm_80, CPUs with AVX512_BF16 or AMX), fp16 with a gradient scaler on older CUDA
    devices, fp32 on other CPUs."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the whole step; of the encoders alone where the step cannot be one graph
    (micro-batches, the symmetric loss, fp16, optimizers other than `sgd_ema`). `auto` is on for
    CUDA with triton and off elsewhere."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """The whole compiled step as a CUDA graph, which spares the host a thousand launches: 5.2 times
    as fast at 32 images on an H200. The third step captures it and compares a replay; it takes more
    memory. `auto` is on for one rank; among several none has been captured yet."""
    log_every: int = 50
    """Steps between two log lines, which are the only host synchronizations of the loop."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints. The last epoch is always saved."""
    checkpoint_minutes: float = 0.0
    """Save also when so many minutes have passed since the last checkpoint, at most once for every
    log line; 0 does not."""
    keep_checkpoints: int = 3
    """Number of most recent checkpoints kept; 0 keeps all of them."""
    keep_every: int = 0
    """The checkpoints at the ends of epochs that are multiples of this stay for good; 0: none."""
    tracker: Literal["none", "wandb", "mlflow", "trackio"] = "none"
    """Sends the records of metrics.jsonl to Weights & Biases, MLflow or trackio as well."""
    max_steps: int = 0
    """Stop, with a checkpoint, after this many steps in all; 0 runs all epochs."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """After a loss or gradient that is not finite: `stop` ends the run; `skip` leaves out the step,
    of which nothing stays in weights, momentum, queue and BN statistics."""
    timeout_s: float = 600.0
    """Seconds after which a collective that a lost rank never joins fails."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and who decodes them."""

    source: Literal["folder", "list", "shards", "parquet", "arrow", "demo", "synthetic"] = "folder"
    """`folder`: images below `data.root`; `list`: named in a text or CSV file; `shards`: in tar
    files; `parquet`, `arrow`: in a column of tables; `demo`: rendered on first use; `synthetic`:
    noise."""
    root: str = ""
    """Folder of images: flat, nested or class folders; its `train` subfolder where `test` or `val`
    is beside it. For a list its file; for shards and tables files or their folder. `~`, `${HOME}`,
    `{00..11}` and `*` are understood."""
    any_name: bool = False
    """Whether files of a folder, and members of shards, count as images by their content too,
    whatever their names."""
    backend: Literal["auto", "dali", "nvjpeg", "array", "pil"] = "auto"
    """Who decodes and crops: `dali`; `nvjpeg`, torchvision's decoder on a GPU; worker processes
    with `array` operations or `pil`, the reference. Colours and blur of all but `pil` are the GPU's
    where there is one. `auto` takes DALI on a GPU where it is installed, else nvJPEG where that
    works, else array operations."""
    workers: int = 0
    """Processes per rank that read (`dali`, `nvjpeg`) or read, decode and augment (`array`, `pil`);
    0 chooses."""
    threads: int = 0
    """DALI threads per rank; 0 chooses."""
    prefetch: int = 2
    """Batches prepared ahead of the step."""
    shuffle_window: int = 0
    """0 shuffles the whole epoch; else shards (or folders) are read one after another and shuffled
    within this many samples, for storage that is slow at random reads."""
    verify: bool = False
    """Decode every image once before training, with all cores, to find the bad ones."""
    rescan: bool = False
    """Index the images anew although nothing seems to have changed."""
    max_pixels: int = 178_956_970
    """An image of more pixels counts as bad; the default is PIL's limit for bombs."""
    channels: int = 3
    """Channels of the views and of the encoder's stem. 3 and 1 take any picture, as RGB or gray;
    other numbers take TIFF and NPY files that have as many."""
    intensity: Literal["auto", "percentiles"] | tuple[float, float] = "auto"
    """For pictures of more than 8 bits: the two values that become 0 and 255, between which nothing
    is rounded and beyond which nothing is clipped. `auto`: the smallest and the largest in a sample
    of the set; `percentiles`: its percentiles 0.1 and 99.9."""
    mean: Literal["default", "auto"] | tuple[float, ...] = "default"
    """Of each channel, where 0..255 is 0..1: what the encoder's input is normalized with. `auto`
    measures a sample of the set; `default` is ImageNet's for 8-bit RGB, else as `auto`."""
    std: Literal["default", "auto"] | tuple[float, ...] = "default"
    """As `data.mean`: the standard deviation of each channel."""
    alpha_over: tuple[int, int, int] = (255, 255, 255)
    """RGB that transparent pixels are composed over; the default is white."""
    exif: Literal["ignore", "apply"] = "ignore"
    """`apply` turns an image as its EXIF orientation says; torchvision's ImageFolder ignores it."""
    max_bad_share: float = 0.01
    """Stop the run once more than this share of the samples had to be replaced."""
    synthetic_samples: int = 1_281_167
    """Length of the synthetic data set."""

    @property
    def float_views(self) -> bool:
        """Whether views are float32 (S, S, C); else uint8 RGB. Known once `auto` is resolved."""
        return self.channels != 3 or self.intensity != "auto"


@dataclass(frozen=True)
class AugmentConfig:
    """Distribution of the two views. The defaults are MoCo v2."""

    recipe: Literal["v1", "v2"] = "v2"
    """Order of operations: v1 turns gray, then jitters; v2 jitters, turns gray, then blurs."""
    image_size: int = 224
    """Side of a view in pixels."""
    min_area: float = 0.2
    """Smallest share of the image's area that a crop covers; the largest is 1."""
    brightness: float = 0.4
    """Brightness factor is uniform in [1 - x, 1 + x]."""
    contrast: float = 0.4
    """Contrast factor is uniform in [1 - x, 1 + x]."""
    saturation: float = 0.4
    """Saturation factor is uniform in [1 - x, 1 + x]."""
    hue: float = 0.1
    """Hue shift is uniform in [-x, x] turns."""
    jitter_p: float = 0.8
    """Probability of the colour jitter."""
    grayscale_p: float = 0.2
    """Probability of turning a view gray."""
    blur_p: float = 0.5
    """Probability of the Gaussian blur."""
    blur_min: float = 0.1
    """Smallest standard deviation of the blur in pixels."""
    blur_max: float = 2.0
    """Largest standard deviation of the blur in pixels."""
    flip_p: float = 0.5
    """Probability of the horizontal flip."""


@dataclass(frozen=True)
class ModelConfig:
    """Encoder: torchvision backbone and projection head."""

    arch: Arch = "resnet50"
    """Backbone. `w2x` and `w4x` multiply every width; the paper's RX50 is resnext50_32x8d."""
    width: float = 1.0
    """Factor on every number of channels of the backbone: 0.5 halves them."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """`cifar` replaces the strided 7x7 convolution and the max pooling by one 3x3 convolution."""
    head: Literal["linear", "mlp"] = "mlp"
    """`linear` is MoCo v1, `mlp` (Linear, ReLU, Linear) is MoCo v2."""
    dim: int = 128
    """C, the dimension of queries and keys."""
    init_from: str = ""
    """Weights to start both encoders from: a checkpoint of MoCo, torchvision, timm, lightly or
    solo-learn, or a run directory. Empty starts at random."""


@dataclass(frozen=True)
class MocoConfig:
    """Momentum Contrast itself."""

    mechanism: Mechanism = "queue"
    """Where negatives come from: `queue` is MoCo; `end_to_end`: the other keys of the global batch,
    trained by gradient too; `memory_bank`: one stored feature per sample (arXiv 1805.01978)."""
    queue_size: int = 65536
    """K, the number of keys in the queue; negatives drawn per step from a memory bank."""
    bank_momentum: float = 0.5
    """Weight of the old entry where a sample that was seen renews it in the memory bank."""
    momentum: float = 0.999
    """m of theta_k <- m theta_k + (1 - m) theta_q."""
    temperature: float = 0.2
    """T that divides every logit; 0.07 in MoCo v1."""
    symmetric: bool = False
    """Contrast both views with the keys of the other and average the two losses."""
    shuffle_bn: ShuffleBN = "auto"
    """How keys leave their queries' BN group; `auto`: all_to_all on several ranks, else split."""
    bn_group_size: int = 32
    """Samples that share batch statistics; 0 takes the whole local batch."""


@dataclass(frozen=True)
class OptimConfig:
    """How the query encoder moves, and the schedule of the learning rate."""

    name: Literal["sgd_ema", "sgd", "lars", "apex_sgd"] = "sgd_ema"
    """`sgd_ema`: SGD and the EMA in one pass; `sgd`: torch's; `lars`: SGD with layer-wise rates for
    large batches (arXiv 1708.03888); `apex_sgd`: NVIDIA apex's, on CUDA where it is built."""
    epochs: int = 200
    """Passes over the data; of each, the last incomplete global batch is dropped."""
    global_batch_size: int = 256
    """Samples per step over all ranks and accumulation steps."""
    accumulate: int = 1
    """Micro-batches per step; the queue and encoder_k advance once per step."""
    lr: float = 0.03
    """Learning rate, used as it is unless `optim.lr_scaling` is linear."""
    lr_scaling: Literal["none", "linear"] = "none"
    """`linear` multiplies `optim.lr` by global_batch_size / 256."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises from 0, linearly, at every step."""
    schedule: Literal["cosine", "step"] = "cosine"
    """After the warm-up, set once per epoch: half a cosine to 0, or a tenth of the rate at
    each milestone."""
    milestones: tuple[int, ...] = (120, 160)
    """Epochs at which the step schedule decays."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """L2 penalty on every parameter, biases and BN included; `lars` leaves those two out."""


@dataclass(frozen=True)
class KnnConfig:
    """The kNN monitor of the frozen trunk, on labelled images."""

    every: int = 0
    """Epochs between two kNN evaluations; 0 turns the monitor off."""
    train_root: str = ""
    """Class folders of the memory bank; empty takes the training images."""
    test_root: str = ""
    """Class folders to classify; empty takes `test` or `val` below `data.root`."""
    k: int = 200
    """Neighbours that vote."""
    resize: int = 256
    """Pixels of the shorter edge before the centre crop of `augment.image_size`."""
    max_bank: int = 0
    """Take at most this many bank images, evenly spaced; 0 takes all."""


@dataclass(frozen=True)
class Config:
    """A run of `torchrun -m fastmoco.train`."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moco: MocoConfig = field(default_factory=MocoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)

    def resolved_lr(self) -> float:
        """Base learning rate after the opt-in linear scaling rule."""
        scale = self.optim.global_batch_size / 256 if self.optim.lr_scaling == "linear" else 1.0
        return self.optim.lr * scale

    def local_batch_size(self, world_size: int) -> int:
        """Samples per rank and micro-batch.

        Raises `ConfigError` unless world_size * optim.accumulate divides the global batch.
        """
        ranks_and_micro = world_size * self.optim.accumulate
        if self.optim.global_batch_size % ranks_and_micro:
            raise ConfigError(
                f"optim.global_batch_size {self.optim.global_batch_size} is not divisible by "
                f"{world_size} ranks x optim.accumulate {self.optim.accumulate}: "
                f"choose a multiple of {ranks_and_micro}."
            )
        return self.optim.global_batch_size // ranks_and_micro

    def negatives(self) -> int:
        """Negatives of each query: K, or the other keys of the batch for `end_to_end`."""
        end_to_end = self.moco.mechanism == "end_to_end"
        return self.optim.global_batch_size - 1 if end_to_end else self.moco.queue_size

    def shuffle_bn(self, world_size: int) -> ShuffleBN:
        """The shuffle-BN strategy that `auto` stands for on this number of ranks."""
        if self.moco.shuffle_bn != "auto":
            return self.moco.shuffle_bn
        if self.moco.mechanism == "memory_bank":  # encodes no keys
            return "none"
        return "all_to_all" if world_size > 1 else "split"

    def bn_group_size(self, world_size: int) -> int:
        """Samples per BN group on one rank: `moco.bn_group_size`, at most the local batch."""
        local = self.local_batch_size(world_size)
        return min(self.moco.bn_group_size or local, local)

    def identity(self) -> dict[str, object]:
        """The fields that decide what is learned, by dotted name.

        Fields that only decide where, how verbosely or how fast it is computed are left out, so
        that a run may be resumed with other workers, another log interval or a moved data folder.
        """
        values = flatten(self)
        return {name: value for name, value in values.items() if name not in _NOT_IDENTITY}


# Also the limits that stop a run: whoever raises one after it has done so wants to go on.
_NOT_IDENTITY = {
    *("run.dir", "run.resume", "run.resume_changes", "run.device", "run.compile", "run.log_every"),
    *("run.checkpoint_every", "run.checkpoint_minutes", "run.keep_checkpoints", "run.keep_every"),
    *("run.cuda_graph", "run.max_steps", "run.timeout_s", "run.tracker", "run.nonfinite"),
    *("data.root", "data.backend", "data.workers", "data.threads", "data.prefetch"),
    *("data.verify", "data.rescan", "data.max_bad_share"),
    *(f"knn.{field.name}" for field in fields(KnnConfig)),
}


def flatten(config: Config) -> dict[str, object]:
    """Every leaf field by its dotted name, in order of declaration."""
    return {
        f"{group}.{name}": value
        for group, values in asdict(config).items()
        for name, value in values.items()
    }
