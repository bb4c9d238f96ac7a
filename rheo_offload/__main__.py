"""`python -m rheo_offload` is the `rheo` command."""

import sys

from rheo_offload.cli.main import main

sys.exit(main())
