"""The probe in the Trainer of Transformers."""

import copy
import shutil

import pytest
import torch
from reference_run import Reference, assert_rows, assert_same_bits

from landscape import LandscapeError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from landscape.integrations.transformers import attach

ETAS = [0.05, 0.1, 0.4]
VOCABULARY, LENGTH = 23, 9
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps one state for each process."""
    yield
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, bos_token_id=0, **SIZES)
    )


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=3, **SIZES)
    )


def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    return peft.get_peft_model(gpt2(), config)


def data(make, examples=14):
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(examples):
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        labels = torch.tensor(index % 3) if make is bert else tokens.clone()
        if make is not bert:
            labels[: index % 5] = -100  # windows differ in their number of items
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


class CountingTrainer(transformers.Trainer):
    """Counts the calls of what users override."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = {"compute_loss": 0, "log": 0, "backward": 0}

    def compute_loss(self, *args, **kwargs):
        self.calls["compute_loss"] += 1
        return super().compute_loss(*args, **kwargs)

    def log(self, *args, **kwargs):
        self.calls["log"] += 1
        return super().log(*args, **kwargs)


class ReferenceTrainer(CountingTrainer):
    """Computes each ray with moved copies of the model."""

    reference = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.reference is not None and model.training:
            now, inner = dict(inputs), self.accelerator.unwrap_model(model)
            steps, original = self.current_gradient_accumulation_steps, super().compute_loss

            def loss(moved):
                calls = dict(self.calls)
                with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
                    value = original(moved, copy.copy(now), num_items_in_batch=num_items_in_batch)
                self.calls = calls
                scaled = (
                    self.model_accepts_loss_kwargs and num_items_in_batch is not None
                ) or self.compute_loss_func is not None
                return value if scaled else value / steps

            self.reference.forward(inner, loss)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class StepReference(transformers.TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.reference.step(self.trainer.optimizer.optimizer)


def make_trainer(tmp_path, make, kind=CountingTrainer, **arguments):
    transformers.set_seed(0)
    arguments = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_steps": 2,
        "max_grad_norm": 0.0,
    } | arguments
    extra = {name: arguments.pop(name) for name in ("compute_loss_func", "optimizers") if name in arguments}
    settings = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, seed=1, **arguments
    )
    return kind(make(), settings, train_dataset=data(make), eval_dataset=data(make, 4), **extra)


def final(trainer):
    state = dict(trainer.model.state_dict()) | {"rng": torch.get_rng_state()}
    for place, one in enumerate(trainer.optimizer.state.values()):
        state |= {f"{place}.{name}": torch.as_tensor(value) for name, value in one.items()}
    return state


def compare(tmp_path, make, prepare=lambda trainer: None, skipped=0, rel=2e-5, **arguments):
    bare = make_trainer(tmp_path / "bare", make, ReferenceTrainer, **arguments)
    bare.reference = Reference(ETAS)
    bare.add_callback(StepReference(bare))
    prepare(bare)
    bare.train()
    expected = final(bare)
    probed = make_trainer(tmp_path / "probed", make, **arguments)
    prepare(probed)
    attached = attach(probed, step_sizes=ETAS)
    probed.train()
    assert_same_bits(final(probed), expected)
    assert probed.calls == bare.calls
    assert_rows(attached.probe.frame(), bare.reference.rows[skipped:], first=skipped, rel=rel)
    return attached.probe.frame()


@pytest.mark.parametrize("make", [gpt2, llama, bert, lora])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_rows_are_those_of_a_plain_loop(make, accumulate, tmp_path):
    frame = compare(tmp_path, make, gradient_accumulation_steps=accumulate)
    assert len(frame) == 2 * -(-7 // accumulate)  # the short last window of each epoch, too


def test_sinks_get_the_rows(tmp_path):
    seen, trainer = [], make_trainer(tmp_path, gpt2)
    attached = attach(trainer, step_sizes=ETAS, sinks=[seen.append])
    trainer.train()
    assert [row["loss"] for row in seen] == attached.probe.frame()["loss"].tolist() != []


CASES = {
    "clipping": (gpt2, {"max_grad_norm": 0.1}),
    "bf16": (gpt2, {"bf16": True, "gradient_accumulation_steps": 2}),
    "label smoothing": (gpt2, {"label_smoothing_factor": 0.2}),
    "label smoothing of classes": (bert, {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}),
    "gradient checkpointing": (gpt2, {"gradient_checkpointing": True}),
    "gradient checkpointing, reentrant": (
        llama,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "evaluation and checkpoints": (gpt2, {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "epoch"}),
    "Adafactor": (gpt2, {"optim": "adafactor"}),
    "loss function": (
        bert,
        {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.square().mean() + labels.float().mean()},
    ),
    "lora, checkpointing, bf16": (lora, {"bf16": True, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name, tmp_path):
    make, arguments = CASES[name]
    compare(tmp_path, make, rel=1e-3 if arguments.get("bf16") else 2e-5, **arguments)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_loss_scaling_with_a_skipped_step(clip, tmp_path):
    def prepare(trainer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
        trainer.accelerator.scaler = scaler  # Accelerate makes one on GPUs only, and unscales with fp16 only
        trainer.accelerator.unscale_gradients = lambda *_: scaler.unscale_(trainer.optimizer.optimizer)

    frame = compare(tmp_path, gpt2, prepare, skipped=1, max_grad_norm=clip)
    assert len(frame) == 13


@pytest.mark.parametrize("restore", [False, True])
def test_resumed_run(restore, tmp_path):
    arguments = {
        "save_strategy": "steps",
        "save_steps": 5,
        "gradient_accumulation_steps": 2,
        "restore_callback_states_from_checkpoint": restore,
    }
    whole = make_trainer(tmp_path / "whole", gpt2, **arguments)
    one = attach(whole, step_sizes=ETAS, trace=tmp_path / "whole trace")
    whole.train()
    shutil.copytree(tmp_path / "whole trace", tmp_path / "trace")
    again = make_trainer(tmp_path / "again", gpt2, **arguments)
    other = attach(again, step_sizes=ETAS, trace=tmp_path / "trace", resume=True)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5"))
    assert_same_bits(final(again), final(whole))
    assert list(other.probe.frame()["step"]) == list(range(8))
    assert [*map(list, one.probe.frame()["losses"])] == [*map(list, other.probe.frame()["losses"])]


def test_training_that_fails_leaves_no_hooks(tmp_path):
    trainer = make_trainer(tmp_path, gpt2)
    attached = attach(trainer, step_sizes=ETAS)

    class Failing(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise RuntimeError("a failing callback")

    trainer.add_callback(Failing())
    with pytest.raises(RuntimeError, match="failing"):
        trainer.train()
    assert len(attached.probe.frame()) == 2
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
    trainer.remove_callback(Failing)
    trainer.train()
    assert len(attached.probe.frame()) == 14


def test_compiled_model(tmp_path):
    """The Trainer's own loss is computed again; one that a user has written is not."""
    arguments = {
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
        "gradient_accumulation_steps": 2,
        "eval_strategy": "epoch",
        "optim": "sgd",
    }
    with pytest.raises(LandscapeError, match="torch_compile"):
        attach(make_trainer(tmp_path, gpt2, **arguments))
    bare = make_trainer(tmp_path / "bare", gpt2, transformers.Trainer, **arguments)
    bare.train()
    expected = final(bare)
    plain = {name: value for name, value in arguments.items() if "compile" not in name}
    rows = compare(tmp_path, gpt2, **plain)
    probed = make_trainer(tmp_path / "probed", gpt2, transformers.Trainer, **arguments)
    attached = attach(probed, step_sizes=ETAS)
    probed.train()
    assert_same_bits(final(probed), expected)
    assert "compute_loss" not in vars(probed)
    assert_rows(
        attached.probe.frame(), [[row["slope"], row["loss"], *row["losses"]] for _, row in rows.iterrows()], rel=1e-4
    )


def test_what_cannot_be_measured_is_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    trainer = make_trainer(tmp_path, gpt2)
    with pytest.raises(LandscapeError, match="GPT2LMHeadModel"):
        attach(trainer.model)
    trainer.args._n_gpu = 2
    with pytest.raises(LandscapeError, match="DataParallel"):
        attach(trainer)
    trainer.args._n_gpu = 0
    trainer.accelerator.state.distributed_type = accelerate.DistributedType.DEEPSPEED
    with pytest.raises(LandscapeError, match="DEEPSPEED"):
        attach(trainer)
    trainer.accelerator.state.distributed_type = accelerate.DistributedType.NO
    attach(trainer)
    with pytest.raises(LandscapeError, match="trainer"):
        attach(trainer)
