"""An iteration of reinforcement learning through the real TPU compiler; needs the tpu extra and no TPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = '''"""Tiny."""
from bc2_jax.config import *
def config():
    model = ModelConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        position_embedding="alibi", vocab_size=1024, model_max_length=512)
    ppo = PPOConfig(prompts_per_step=8, minibatches=2, rollout_rows=8, max_prompt_tokens=256, max_new_tokens=256)
    return RLConfig(name="tiny", num_steps=30, model=model, ppo=ppo, compute=ComputeConfig(attention="flash"))
'''


def test_the_tool_on_reinforcement_learning(tmp_path: Path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    command = [
        sys.executable, "tools/aot_compile.py", str(tmp_path / "tiny.py"), "--topology", "v5p:2x2x1",
        "--json", str(tmp_path / "out.json"), "--hlo", str(tmp_path / "out.txt"), "--ppo.rollout-gathers-once",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    rollout = figures["rollout"]
    assert figures["sequences_per_chip"] == 2 and rollout["rows"] == 8
    held = rollout["held_bytes_per_chip"]
    # fp32 parameters and two moments of two models, two models in bf16; the critic has no head.
    assert held["actor's parameters"] > held["critic's parameters"]
    assert held["actor's parameters"] == 2 * held["reference"] < held["optimizer"]
    assert rollout["update_peak_bytes_per_chip"] > sum(held.values())
    assert rollout["rollout_peak_bytes_per_chip"] > sum(held.values()) + rollout["prepared_bytes_per_chip"]
    # The layers' weights are there whole: decoding gathers none.
    gathered = rollout["decode"]["collectives"].get("all-gather", {"bytes": 0})["bytes"]
    assert gathered < rollout["prepared_bytes_per_chip"] / 4
    for name in ("out.txt", "out_extend.txt", "out_decode.txt"):
        assert "is_scheduled=true" in (tmp_path / name).read_text()[:2000]
