# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""How the protocols that train do it, with the published recipes as defaults."""

import inspect
import json
import math
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from clmae.configuration.errors import InputError
from clmae.training.arguments import ScaledRateArguments

PROBE_FEATURES = ("cls", "mean")
MAX_RANDAUGMENT = 10

# Fields of `TrainingArguments` that decide a result: they are written down with it, beside the fields declared here.
_RECORDED = {
    *("max_steps", "gradient_accumulation_steps", "dataloader_drop_last", "seed", "data_seed", "bf16", "fp16"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs", "label_smoothing_factor"),
    *("eval_strategy", "load_best_model_at_end"),
}
# Fields that are declared here and decide none.
_UNRECORDED = {
    *("output_dir", "save_strategy", "save_total_limit", "per_device_eval_batch_size"),
    *("logging_steps", "logging_nan_inf_filter", "remove_unused_columns", "label_names"),
}


def check_range(name: str, value: Any, interval: str) -> None:
    """InputError unless `value` is a number in an interval, written as `"[0, 1)"`."""
    low, high = map(float, interval[1:-1].split(","))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not is_number
        or not low <= value <= high
        or (value == low and interval[0] == "(")
        or (value == high and interval[-1] == ")")
    ):
        raise InputError(f"`{name}` is {value!r}; give a number in {interval}.")


@dataclass
class ClassificationArguments(ScaledRateArguments):
    """`TrainingArguments` with what fine-tuning and the linear probe share; use one of the two subclasses.

    Nothing is chosen by the test set: it is seen once, by the weights of the last step. With an `eval_strategy` (which
    `load_best_model_at_end` asks for) a part of the training set is held out, and evaluated on.

    Raises:
        InputError: One of the fields is out of range; the message names it.
    """

    # Fields of [`FinetuningArguments`]; the linear probe does without.
    layer_decay, ema_decay = 1.0, 0.0
    mixup_alpha = cutmix_alpha = randaugment_magnitude = randaugment_std = random_erasing_probability = 0.0

    _ranges = {  # of the fields that are numbers
        "base_learning_rate": "[0, 1e6]",
        "weight_decay": "[0, 1e6]",
        "validation_share": "(0, 1)",
        "min_crop_scale": "(0, 1]",
    }
    output_dir: str | None = HfArg(
        default="outputs/trained",
        help="Folder for checkpoints and the trained models; of the command, what `output` is called.",
    )
    base_learning_rate: float = HfArg(
        default=5e-4, help="Learning rate for a total batch of 256 images; scaled linearly with the total batch."
    )
    min_crop_scale: float = HfArg(
        default=0.08, help="Smallest share of an image's area that a random crop shows, in (0, 1]."
    )
    horizontal_flip: bool = HfArg(default=True, help="Mirror half of the training images.")
    validation_share: float = HfArg(
        default=0.1, help="Share of each class held out of the training set where there is an eval_strategy; (0, 1)."
    )
    per_device_eval_batch_size: int = HfArg(default=256, help="Evaluation images per device and step.")
    metric_for_best_model: str | None = HfArg(
        default="accuracy", help="For load_best_model_at_end: accuracy or loss, on the held-out part."
    )
    save_strategy: str = HfArg(default="epoch", help="When to save checkpoints: no, steps, epoch, best.")
    save_total_limit: int | None = HfArg(default=1, help="Checkpoints kept; the oldest is deleted.")
    label_names: list[str] | None = HfArg(default_factory=lambda: ["labels"], help="What labels are called in a batch.")

    @property
    def data_order_seed(self) -> int:
        """Seed of order, augmentation and mixing."""
        return self.seed if self.data_seed is None else self.data_seed

    def recorded(self) -> dict[str, Any]:
        """The settings that decide a result, as JSON has them."""
        owners = [owner for owner in type(self).__mro__ if issubclass(owner, ScaledRateArguments)]
        names = _RECORDED.union(*(inspect.get_annotations(owner) for owner in owners)) - _UNRECORDED
        return {name: json.loads(json.dumps(getattr(self, name), default=str)) for name in sorted(names)}

    def _check(self) -> None:
        super()._check()
        for name, interval in self._ranges.items():
            check_range(name, getattr(self, name), interval)
        if self.label_names != ["labels"] or self.remove_unused_columns:
            raise InputError("`label_names` and `remove_unused_columns` cannot be changed here; leave them out.")
        if self.auto_find_batch_size:
            raise InputError("`auto_find_batch_size` changes the batch that the learning rate follows; leave it out.")


@dataclass
class FinetuningArguments(ClassificationArguments):
    """MAE's fine-tuning recipe (arXiv 2111.06377, table 9) as defaults; with `trained_blocks`, partial fine-tuning.

    `layer_decay` 0.75 is the paper's; its published code takes 0.65 for ViT-B. RandAugment is that of torchvision (its
    operations and ranges, strength `magnitude / 10`) with timm's noise: two operations per image, each with probability
    1/2 and a strength of its own. The timm policy that MAE used also inverts, adds while solarising, and posterises
    harder. For mixup and cutmix each batch takes one of the two at random. Positions that a family fixes stay fixed.
    """

    _ranges = {
        **ClassificationArguments._ranges,
        "layer_decay": "(0, 1]",
        **dict.fromkeys(("drop_path_rate", "label_smoothing_factor", "ema_decay"), "[0, 1)"),
        **dict.fromkeys(("mixup_alpha", "cutmix_alpha"), "[0, 1e3]"),
        **dict.fromkeys(("randaugment_magnitude", "randaugment_std"), f"[0, {MAX_RANDAUGMENT}]"),
        "random_erasing_probability": "[0, 1]",
    }
    layer_decay: float = HfArg(
        default=0.75, help="Learning rate of a block as a share of the next one's, in (0, 1]; ViT-B: 0.65."
    )
    trained_blocks: int | None = HfArg(
        default=None, help="Train only so many of the last blocks, and the head with its LayerNorm; 0: no block."
    )
    drop_path_rate: float = HfArg(
        default=0.1, help="Stochastic depth of the last block, rising from 0 at the first; in [0, 1)."
    )
    label_smoothing_factor: float = HfArg(
        default=0.1, help="Share of each target that is spread over all classes, in [0, 1)."
    )
    mixup_alpha: float = HfArg(default=0.8, help="Mixup's Beta(alpha, alpha); 0: no mixup.")
    cutmix_alpha: float = HfArg(default=1.0, help="Cutmix's Beta(alpha, alpha); 0: no cutmix.")
    randaugment_magnitude: float = HfArg(default=9.0, help="Strength of RandAugment, up to 10; 0: no RandAugment.")
    randaugment_std: float = HfArg(
        default=0.5, help="Standard deviation of that strength, drawn anew for each operation."
    )
    random_erasing_probability: float = HfArg(
        default=0.25, help="Share of the images of which a rectangle is replaced by noise."
    )
    ema_decay: float = HfArg(
        default=0.0, help="Evaluate an exponential moving average of the weights with this decay, as 0.9999; 0: off."
    )

    @property
    def protocol(self) -> str:
        """`"finetune"`, or `"partial"` where `trained_blocks` is given."""
        return "finetune" if self.trained_blocks is None else "partial"

    def _check(self) -> None:
        super()._check()
        if self.ema_decay and self.load_best_model_at_end:
            raise InputError(
                "`ema_decay` and `load_best_model_at_end` are both given: the average is of all steps, and the best "
                "model of one; leave one of them out."
            )
        if self.trained_blocks is not None:
            self._check_int("trained_blocks", 0)


@dataclass
class LinearLarsArguments(ClassificationArguments):
    """MAE's linear probe (arXiv 2111.06377, table 10) as defaults; `optim` and AdamW's betas have no meaning here.

    Images are cropped at random and mirrored, nothing more. A step changes the weight by about `learning_rate * 0.001`
    of its norm (times 10, by the momentum): with few steps, take a higher rate. The paper's is 6.4, for 16,384 images.
    """

    _ranges = {
        **ClassificationArguments._ranges,
        "lars_momentum": "[0, 1)",
        "lars_trust_coefficient": "(0, inf)",
    }
    base_learning_rate: float = HfArg(
        default=0.1, help="Learning rate for a total batch of 256 images; scaled linearly with the total batch."
    )
    weight_decay: float = HfArg(default=0.0, help="Weight decay of the linear layer's weight.")
    num_train_epochs: float = HfArg(default=90.0, help="Passes over the training images.")
    warmup_steps: float = HfArg(default=10 / 90, help="Linear warm-up: steps, or below 1 the share of all steps.")
    per_device_train_batch_size: int = HfArg(default=256, help="Training images per device and step.")
    lars_momentum: float = HfArg(default=0.9, help="LARS's momentum, in [0, 1).")
    lars_trust_coefficient: float = HfArg(default=0.001, help="LARS's trust coefficient, above 0.")
    feature: str = HfArg(default="cls", help="cls (class token: MAE's) or mean (of the patch tokens); not trained.")

    @property
    def protocol(self) -> str:
        """`"linear-lars"`."""
        return "linear-lars"

    def recorded(self) -> dict[str, Any]:
        """The settings that decide a result, as JSON has them."""
        recorded = {name: value for name, value in super().recorded().items() if not name.startswith("adam")}
        return {**recorded, "optim": "lars"}

    def _check(self) -> None:
        super()._check()
        if self.feature not in PROBE_FEATURES:
            raise InputError(f"`feature` is {self.feature!r}; choose one of {', '.join(PROBE_FEATURES)}.")


PROTOCOLS: dict[str, type[ClassificationArguments]] = {
    "finetune": FinetuningArguments,
    "partial": FinetuningArguments,
    "linear-lars": LinearLarsArguments,
}
