"""The rung of hidden size 384 of the paper's ladder, on 10^12 tokens (docs/scaling.md).

python train.py configs/scaling/paper_h384.py --data.sources.0.path ROWS --data.tokenizer tokenizer.model
"""

import functools

from bc2_jax.evaluate.scaling.ladder import paper_rung

config = functools.partial(paper_rung, 384)
