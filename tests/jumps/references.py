"""Reference numbers of jump processes, computed by independent programs."""

import json
from pathlib import Path

REFERENCE = json.loads((Path(__file__).parent / "jumps_reference.json").read_text())
