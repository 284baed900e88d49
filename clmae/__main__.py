# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`python -m clmae`: the same as `clmae`."""

from clmae.cli import main

raise SystemExit(main())
