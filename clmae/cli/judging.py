# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What every `clmae evaluate PROTOCOL` is told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class JudgingArguments:
    """What to judge, on which images, and where to write it."""

    model: str = field(metadata={"help": "Folder or Hub id of an encoder that AutoModel loads."})
    dataset: str = field(metadata={"help": "Labelled images: Hub id, folder with a folder for each class, parquet."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to learn from."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split to be judged on; test, or without one a random fifth of each class."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if there are several."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes, if there are several."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Learn from at most so many images."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Be judged on at most so many images."})
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON file for the result and all that is needed to repeat it; beside it .md, tables by class."
        },
    )
