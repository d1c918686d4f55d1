"""The demo's model becomes a chat model: dialogues in Chinese and English, and questions with one right answer.

python train.py configs/demo_chat.py          # about 4 minutes on 2 cores, after the demo (python train.py)
python train.py configs/demo_chat.py --lora.rank 16      # adapters alone

Takes the model of runs/demo, and trains it if it is not there. Prints what the model answers before and after, the
share of held-out questions that it answers right, and how to chat with it.
"""

import dataclasses
import runpy
from pathlib import Path

from bc2_jax.config import DataConfig, FineTuneConfig, OptimizerConfig, QuestionsConfig, SourceConfig

FILE = Path(__file__)
DEMO = runpy.run_path(str(FILE.with_name("demo.py")))
BASE = "runs/demo"
PREPARED = "prepared by configs/demo_chat.py"
# About the share of rows each has, so that they end together.
WEIGHTS = {"dialogues": 1, "tasks": 4}


def config() -> FineTuneConfig:
    demo = DEMO["config"]()
    return FineTuneConfig(
        name="demo_chat",
        # Max-z is for pre-training: the authors did not use it for fine-tuning.
        model=dataclasses.replace(demo.model, z_loss_weight=0.0),
        init_from=BASE,
        # prepare() fetches and packs the conversations and names the real paths.
        data=DataConfig(
            sources=(SourceConfig(path=PREPARED),), tokenizer=PREPARED,
            sequence_length=demo.data.sequence_length, global_batch_size=demo.data.global_batch_size,
        ),
        compute=demo.compute,
        mesh=demo.mesh,
        optimizer=OptimizerConfig(
            peak_learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=10, decay_steps=200, b2=0.98,
            weight_decay=1e-4, clip_norm=1.0,
        ),
        checkpoint=dataclasses.replace(demo.checkpoint, save_every=100),
        questions=QuestionsConfig(limit=100, max_new_tokens=24),
        num_steps=200,
        log_every=25,
        eval_every=50,
        verify_resume_steps=3,
        export_hf=True,
    )  # fmt: skip


def prepare(config: FineTuneConfig) -> FineTuneConfig:
    """Trains the demo if its model is not there; fetches, makes and packs the conversations, once.

    Rows and tokenizer given on the command line are used instead.
    """
    from bc2_jax.align.demo_runs import require_run

    if config.init_from == BASE:
        require_run(config, "init_from", BASE, FILE.with_name("demo.py"))
    if config.data.sources != (SourceConfig(path=PREPARED),) or config.data.tokenizer != PREPARED:
        return config
    from bc2_jax.align.demo import prepare_chat_demo

    rows = prepare_chat_demo(Path(str(config.init_from)), sequence_length=config.data.sequence_length)
    sources = tuple(SourceConfig(path=str(path), weight=WEIGHTS[path.name]) for path in rows.sources)
    questions = config.questions
    if questions.path == "auto":
        questions = dataclasses.replace(questions, path=str(rows.questions))
    data = dataclasses.replace(config.data, sources=sources, tokenizer=str(rows.tokenizer))
    return dataclasses.replace(config, data=data, questions=questions)
