# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What do MAE, CL-MAE and CMAE learn under equal conditions? `benchmarks/study.py` for the study.yaml beside this file.

python benchmarks/cifar10_study/study.py run --scale cpu      # and `cell`, `table`: --help
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.argv.insert(2, HERE.name)
runpy.run_path(str(HERE.parent / "study.py"), run_name="__main__")
