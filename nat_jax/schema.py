"""Every key of a config: its default, what it means, what it may be, and when it may change.

Validation, ``--help``, the rules on using a run again, and the table in docs/configuration.md are
read from ``KEYS``. This module imports neither JAX nor NumPy.
"""

import importlib
from typing import Any, NamedTuple

# Kinds of keys: who reads a key decides when its value may change.
TRAINING = "training"  # decides what is trained: fixed for a run
EVALUATION = "evaluation"  # read by tasks that use a trained network: from their own command line
PER_HOST = "per-host"  # where the same data is and how it is read: processes may differ
FREE = "free"  # where computation runs, what is kept or shown: may change when a run goes on


class Key(NamedTuple):
    """A key of a config.

    Attributes:
        name: its full name, such as "optim.momentum".
        default: also fixes the type; None is an integer that is not set, {} is a free group.
        help: what it means, with its unit.
        choices: what it, or each entry of a tuple, may be: words, and names of constants of nat_jax
            whose keys or entries these are, such as "targets.KINDS". Empty: anything.
        least: smallest value of it, or of each entry.
        optional: whether a tuple may be empty.
        kind: TRAINING, EVALUATION, PER_HOST or FREE.
    """

    name: str
    default: Any
    help: str
    choices: str = ""
    least: float | None = None
    optional: bool = False
    kind: str = ""

    @property
    def type(self) -> type:
        """The type of its value."""
        return int if self.default is None else type(self.default)

    def known(self) -> tuple[str, ...]:
        """Return what it may be; empty if anything."""
        found: list[str] = []
        for word in self.choices.split():
            module, _, constant = word.rpartition(".")
            if module:
                found += getattr(importlib.import_module(f"nat_jax.{module}"), constant)
            else:
                found.append(word)
        return tuple(found)


KEYS: dict[str, Key] = {}


def _add(group: str, kind: str, *keys: Key) -> None:
    """Add keys of a group and a kind to ``KEYS``, by full name."""
    for key in keys:
        name = f"{group}.{key.name}" if group else key.name
        KEYS[name] = key._replace(name=name, kind=kind)


_add(
    "",
    EVALUATION,
    Key("task", "pretrain", "what to do; --help lists the tasks"),
    Key(
        "network",
        "",
        "network that other tasks use: '' (the workdir's) | untrained | folder of run or bundle",
    ),
)
_add(
    "",
    TRAINING,
    Key("seeds", (0,), "one run each; several share one table with mean and deviation"),
    Key("epochs", 0.0, "length of the run; raise it to extend one that has ended"),
    Key("steps", 0, "the same in steps; exactly one of the two is set"),
    Key("batch_size", 256, "over all devices; also the images matched together", least=1),
)
_add(
    "data",
    PER_HOST,
    Key("source", "digits", "digits | folder:PATH | arrays:PATH | tfds:NAME | arrayrecord:GLOB"),
    Key("threads", 2, "decoding threads of a process", least=1),
    Key("workers", 0, "decoding processes, for many cores; 0: threads alone", least=0),
    Key("prefetch", 8, "batches that a process prepares ahead", least=1),
    Key("timeout", 300.0, "seconds that reading one record may take"),
)
_add(
    "data",
    TRAINING,
    Key("per_class", 0, "only the first N images of each class; 0: all", least=0),
    Key("image_size", 8, "side in pixels of what the network sees", least=1),
    Key("resize", 0, "shortest side before the crop; 0: scale the image to a square", least=0),
    Key("crop", "random_crop", "random_resized_crop is Inception's", "input.transforms.CROPS"),
    Key("min_area", 0.08, "smallest share of the image that random_resized_crop takes"),
    Key("pad", 0, "shift images that are not cropped by up to this many pixels", least=0),
    Key("flip", False, "mirror half of the images"),
    Key(
        "color_jitter",
        0.0,
        "strength of random colour changes of training images; SimCLR: 0.5 on CIFAR-10",
    ),
    Key("grayscale", 0.0, "probability that a training image is converted to grey; 0.2 in SimCLR"),
    Key(
        "white",
        0,
        "value that is white in PNG, TIFF and PNM files of 16 bits; 0: 65535; 12 bits: 4095",
        least=0,
    ),
    Key("views", 1, "images made of each record, with one target (2: beyond the paper)", least=1),
)
_add(
    "data",
    FREE,
    Key(
        "on_bad_record",
        "grey",
        "grey: keep its place with weight 0, at most 1 % of the records; error: stop",
        "input.pipeline.ON_BAD_RECORD",
    ),
    Key("augment_on", "auto", "where images in memory are shifted, flipped", "auto host device"),
)
_add(
    "model",
    TRAINING,
    Key("name", "convnet", "convnet | alexnet", "models.MODELS"),
    Key("dim", 16, "D, the dimension of features and targets"),
    Key("frontend", "sobel", "fixed filters before the network", "models.FRONTENDS"),
    Key("dtype", "float32", "compute dtype", "models.DTYPES"),
    Key("bn_groups", 1, "parts of the batch with batch statistics of their own"),
    Key("options", {}, "arguments of the network's function, such as widths"),
)
_add(
    "targets",
    TRAINING,
    Key(
        "kind",
        "sphere",
        "sphere: random unit vectors; basis: the paper's discrete ones, k = model.dim; labels: "
        "supervised, one-hot rows of the classes, model.dim is their number",
        "targets.KINDS",
    ),
    Key("storage", "auto", "auto: a table up to 1 GiB", "targets.STORAGES"),
)
_add(
    "assign",
    TRAINING,
    Key(
        "scope",
        "batch",
        "batch: images of a batch are matched, in its step; dataset: all images, between epochs "
        "(beyond the paper)",
        "batch dataset",
    ),
    Key("solver", "auction", "solver of the assignment problems", "assign.SOLVERS"),
    Key(
        "reassign_every_epochs",
        3,
        "1: in every epoch; 3: the paper's; 0: never; with scope dataset after these epochs",
        least=0,
    ),
    Key("block", None, "images matched together; None: the batch"),
    Key(
        "storage",
        "auto",
        "how the permutation, and features kept, are stored; auto: sharded from 64 MiB",
        "auto replicated sharded",
    ),
    Key("options", {}, "arguments of the solver, such as eps; with scope dataset: budget"),
)
_add(
    "assign",
    FREE,
    Key(
        "placement",
        "auto",
        "where problems are solved: auto, device, host; auto: on the host for GPUs and TPUs",
        "auto device host",
    ),
)
_add(
    "optim",
    TRAINING,
    Key("loss", "square", "on unit features; softmax: supervised, on logits", "losses.LOSSES"),
    Key(
        "learning_rate", 5.12, "for a loss averaged over the batch"
    ),  # the authors' 0.01 on a summed loss
    Key(
        "schedule", "constant", "learning-rate schedule; inverse is the paper's", "optim.SCHEDULES"
    ),
    Key("decay_start", 0, "step at which the decay of schedule inverse starts (t0)", least=0),
    Key("gamma", 0.0, "decay per step of schedule inverse", least=0),
    Key("warmup_epochs", 0.0, "linear warm-up from zero"),
    Key("warmup_steps", 0, "the same in steps; at most one of the two is set"),
    Key("momentum", 0.0, "heavy-ball momentum", least=0),
    Key("weight_decay", 0.0, "L2 penalty on kernels", least=0),
)
_add(
    "mesh",
    FREE,
    Key("data", -1, "devices along the batch; -1: all that mesh.model leaves"),
    Key("model", 1, "devices along wide fully connected layers; -1: all others"),
)
_add(
    "eval",
    EVALUATION,
    Key("source", "", "test images of this source; '': of data.source"),
    Key("train_source", "", "probes learn on images of this source; '': of eval.source"),
    Key("every_epochs", 0, "evaluate during training too; 0: at the end only", least=0),
    Key(
        "probes",
        ("knn", "linear_probe", "mlp_probe"),
        "probes that score the features; (): nothing is scored",
        optional=True,
    ),
    Key("layers", ("z", "last_conv"), "names; last_conv: the last convolution; all: every one"),
    Key("labels_per_class", (0, 10), "labels to learn from; 0: all", least=0),
    Key("max_train", 0, "records to learn on, drawn by seed; 0: all", least=0),
    Key("max_features", 9600, "larger feature maps are average-pooled to this many", least=1),
    Key("batch_size", 256, "images per batch of feature extraction", least=1),
    Key("knn_k", 20, "neighbours that vote", least=1),
    Key(
        "knn_ks",
        (1, 5, 10, 20, 50, 100, 200),
        "numbers of neighbours that the task knn compares",
        least=1,
    ),
    Key(
        "linear_fit",
        "auto",
        "auto: lbfgs up to 2 GiB of features, then sgd",
        "auto evaluate.probes.linear.FITS",
    ),
    Key(
        "mlp_width",
        None,
        "hidden units of the MLP; None: the authors' 4096, below 100,000 records 512",
        least=1,
    ),
    Key(
        "mlp_epochs",
        None,
        "epochs that the MLP is trained for; None: the authors' 100, below 100,000 records 50",
        least=1,
    ),
    Key(
        "mlp_init",
        "torch",
        "torch: the authors' code; gaussian: the paper's text",
        "evaluate.probes.mlp.INITS",
    ),
    Key("fresh_crops", True, "tasks mlp_probe, linear_probe by sgd: augment in each epoch"),
    Key(
        "ten_crops",
        "auto",
        "tasks mlp_probe, linear_probe by sgd: test on ten crops; auto: with data.resize",
        "auto on off",
    ),
    Key("few_labels", (0.01, 0.1, 10), "task low_shot: shares below 1, else labels per class"),
    Key("few_splits", (0, 1, 2), "task low_shot: seeds of its subsets", least=0),
    Key(
        "baselines",
        ("pixels",),
        "features without a network, for the same table; docs/rivals.md",
        "report.rows.NO_NETWORK",
        optional=True,
    ),
    Key("patch_centroids", 1600, "units of baselines patches, som and gas", least=1),
    Key("smt_atoms", 8192, "atoms of baseline smt", least=128),
    Key("diffrac_clusters", 100, "clusters of baseline diffrac", least=2),
    Key("sift_gaussians", 64, "Gaussians of baseline sift", least=1),
    Key("compare", (), "folders of other runs or bundles for the same table", optional=True),
    Key("queries", 8, "test images of the task retrieval", least=1),
    Key("neighbours", 10, "training images for each of them", least=1),
    Key("to", "", "folder for the results of a task; '': the workdir"),
)
_add(
    "checkpoint",
    FREE,
    Key("every_epochs", 1.0, "how often the state is saved"),
    Key("every_steps", 0, "the same in steps; exactly one of the two is set"),
    Key("keep", 2, "checkpoints that are kept", least=1),
)
_add(
    "log",
    FREE,
    Key("every_steps", 10, "steps between two rows of metrics.jsonl", least=1),
    Key("tensorboard", False, "also for TensorBoard; needs the extra nat_jax[tensorboard]"),
)
_add(
    "suite",
    FREE,
    Key("scale", "", "of the paper's experiments: cifar10 | fashion_mnist | digits"),
    Key("experiments", (), "which of configs/paper; (): all", optional=True),
)
_add(
    "convert",
    FREE,
    Key("to", "", "folder to write"),
    Key("shard_mb", 1024, "size of a shard in MiB, about"),
)
_add(
    "export",
    EVALUATION,
    Key("to", "", "folder to write; '': bundle, in the workdir"),
    Key("program", True, "also a StableHLO program of eval.layers, which needs no nat_jax"),
)
_add(
    "features",
    EVALUATION,
    Key("to", "", "folder to write; '': features, in the workdir"),
    Key("source", "", "images to use; '': data.source"),
    Key("splits", ("train", "test"), "splits of features.source", "input.sources.SPLITS"),
)

# Old names of keys within the same group. On the command line an old name is an error that names
# the new one; in saved configs and users' config files it is still accepted.
RENAMED = {
    "data.grey": "data.grayscale",
    "eval.beside": "eval.compare",
}


def kind_of(name: str) -> str:
    """Return the kind of a key, of an option, or of a key that only other versions have."""
    group = name.rpartition(".")[0]
    key = KEYS.get(name) or KEYS.get(group)
    if key is not None:
        return key.kind
    kinds = {key.kind for key in KEYS.values() if key.name.startswith(f"{group}.")}
    return kinds.pop() if len(kinds) == 1 else TRAINING


def renamed(name: str) -> str:
    """Return the message for an old name of a key."""
    return f"config: {name!r} is now called {RENAMED[name]!r}"
