"""The default settings of curation, for Chinese, English and code.

python tools/curate.py RAW... --out DIR --config configs/curation/default.py
"""

from bc2_jax.curate.config import CurationConfig


def config() -> CurationConfig:
    return CurationConfig()
