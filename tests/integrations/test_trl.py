"""The probe in TRL's trainer of supervised fine-tuning, a subclass of that of Transformers."""

import types

import pytest
import torch
from reference_run import Reference, assert_rows, assert_same_bits

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from landscape.integrations.transformers import attach

ETAS = [0.05, 0.1, 0.4]
WORDS = ["<pad>", "<eos>", *"abcdef"]


def tokenizer():
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


class ReferenceTrainer(trl.SFTTrainer):
    """Computes each ray with moved copies of the model, which its own metrics count, too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        original, forward = super().compute_loss, model.forward.__func__

        def loss(moved):
            moved.forward = types.MethodType(forward, moved)  # TRL's own, which a copy lacks
            return original(moved, dict(inputs), num_items_in_batch=num_items_in_batch)

        self.reference.forward(self.accelerator.unwrap_model(model), loss)
        return original(model, inputs, return_outputs, num_items_in_batch)


class StepReference(transformers.TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.reference.step(self.trainer.optimizer.optimizer)


def make_trainer(folder, kind=trl.SFTTrainer, **arguments):
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    arguments = trl.SFTConfig(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=0.01,
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **arguments,
    )
    texts = datasets.Dataset.from_dict({"text": [" ".join("abcdef"[index % 3 : 3 + index % 4]) for index in range(14)]})
    model = transformers.GPT2LMHeadModel(config)
    return kind(model, args=arguments, train_dataset=texts, processing_class=tokenizer())


def logs(trainer):
    """Return all that was logged but times."""
    return [
        {name: value for name, value in row.items() if "_per_" not in name and "time" not in name}
        for row in trainer.state.log_history
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of Transformers, about what TRL sets
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_training_and_its_metrics_are_those_without_a_probe(loss_type, tmp_path):
    """TRL counts tokens in ``compute_loss``: a second call would count them again."""
    bare = make_trainer(tmp_path / "bare", loss_type=loss_type)
    bare.train()
    random = torch.get_rng_state()
    probed = make_trainer(tmp_path / "probed", loss_type=loss_type)
    attached = attach(probed, step_sizes=ETAS)
    probed.train()
    assert_same_bits(dict(probed.model.state_dict()), dict(bare.model.state_dict()))
    assert torch.equal(torch.get_rng_state(), random)
    assert logs(probed) == logs(bare)
    assert "num_tokens" in logs(bare)[0]
    assert len(attached.probe.frame()) == bare.state.global_step == 6


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of Transformers, about what TRL sets
def test_rows_are_those_of_moved_copies(tmp_path):
    plain = make_trainer(tmp_path / "plain", ReferenceTrainer, loss_type="nll")
    plain.reference = Reference(ETAS)
    plain.add_callback(StepReference(plain))
    plain.train()
    probed = make_trainer(tmp_path / "probed", loss_type="nll")
    attached = attach(probed, step_sizes=ETAS)
    probed.train()
    assert_rows(attached.probe.frame(), plain.reference.rows, rel=2e-5)
