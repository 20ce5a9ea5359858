"""Writes `models/golden/configs.json`: every case's config.json as transformers rewrites it today, by case.

    v/bin/python models/golden/make/configs.py      (the environment of architectures.py)
"""

import json
from pathlib import Path

from transformers import AutoConfig

GOLDEN = Path(__file__).resolve().parent.parent

folders = sorted(path.parent for path in GOLDEN.glob("*/config.json"))
configs = {folder.name: json.loads(AutoConfig.from_pretrained(folder).to_json_string()) for folder in folders}
(GOLDEN / "configs.json").write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")
