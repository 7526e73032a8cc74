"""The trainer with the library's own GPT: it learns, resumes bit by bit, and leaves a folder that others load."""

import os
import signal

import pytest
import torch
from tiny_lm import VOCAB, make_data

from fastattn.data import Tokenizer, default_corpus, train_bpe
from fastattn.models import GPT, GPTConfig, load
from fastattn.models.lora import attach
from fastattn.train.checkpoint import UNFINISHED, RunDirectory, read_model


def make_gpt(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "dropout": 0.1}
    return GPT(GPTConfig(**{**sizes, **options}))


def stop_after(step):
    """A callback that asks the run to stop once it has taken this many steps."""

    def interrupt(record):
        if record["event"] == "train" and record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return interrupt


def test_gpt_learns_and_resumes_bit_by_bit(make_trainer):
    options = {"max_steps": 30, "save_every": 10, "eval_every": 15, "lr": 1e-2, "dev": make_data(seed=1)}
    straight = make_trainer(model=make_gpt(), out="straight", **options)
    result = straight.fit()
    assert result.last.perplexity < 0.6 * result.first.perplexity

    class Killed(Exception):
        pass

    def kill(record):
        if record["step"] == 15 and record["event"] == "eval":
            raise Killed

    with pytest.raises(Killed):
        make_trainer(model=make_gpt(), **options, keywords={"on_record": kill}).fit()
    resumed = make_trainer(model=make_gpt(seed=4), **options, resume="auto")
    assert resumed.directory.resume_from.name == "checkpoint-10"
    again = resumed.fit()
    wanted, found = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert again.last == result.last


def test_models_beyond_the_size_of_a_shard_are_one_file_and_resume(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setitem(GPT.save_pretrained.__kwdefaults__, "max_shard_size", 1000)
    make_gpt().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model = make_gpt()
    make_trainer(model=model, dev=make_data(seed=1), max_steps=2).fit()
    resumed = make_trainer(model=make_gpt(seed=4), max_steps=3, resume="auto")
    assert resumed.directory.resume_from.name == "checkpoint-2"
    resumed.fit()
    assert [path.name for path in (tmp_path / "run").glob("*.safetensors")] == ["model.safetensors"]


def test_adapters_train_resume_and_load(make_trainer, tmp_path):
    make_gpt().save_pretrained(tmp_path / "base")

    def adapted(seed):
        torch.manual_seed(seed)
        return attach(load(tmp_path / "base"), r=2)

    options = {"save_every": 2, "log_every": 2, "dev": make_data(seed=1)}
    straight = make_trainer(model=adapted(1), out="straight", max_steps=4, **options)
    straight.fit()
    make_trainer(model=adapted(1), max_steps=4, **options, keywords={"on_record": stop_after(2)}).fit()
    resumed = make_trainer(model=adapted(2), max_steps=4, resume="auto", **options)
    assert resumed.directory.resume_from.name == "checkpoint-2"
    resumed.fit()
    wanted, found = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    best = load(tmp_path / "run")
    ids = torch.arange(10)[None] % VOCAB
    kept = adapted(3)
    read_model(kept, tmp_path / "run")
    assert torch.equal(best(ids).logits, kept.eval()(ids).logits)
    assert not torch.equal(best(ids).logits, load(tmp_path / "base")(ids).logits)


def test_files_in_subfolders_are_replaced_too(tmp_path):
    class WithFiles(GPT):
        number = 0

        def extra_files(self):
            self.number += 1
            return {"part/config.json": str(self.number).encode()}

    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    model = WithFiles(make_gpt().config)
    for number in (1, 2):
        directory.save_model(model, None)
        assert (tmp_path / "run" / "part" / "config.json").read_text() == str(number)
    assert not list((tmp_path / "run").glob(f"{UNFINISHED}*"))


def test_output_directory_loads_as_a_model_and_in_transformers(make_trainer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe(default_corpus()[:5], 300)
    model = make_gpt(vocab_size=300)
    trainer = make_trainer(model=model, dev=make_data(seed=1), max_steps=3, keywords={"tokenizer": tokenizer})
    result = trainer.fit()
    ids = torch.tensor([Tokenizer.from_pretrained(tmp_path / "run").encode("The list is")])
    for folder in (tmp_path / "run", result.checkpoint):
        ours = GPT.from_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert transformers.AutoTokenizer.from_pretrained(folder)("The list is").input_ids == ids[0].tolist()
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    best = make_gpt(seed=7, vocab_size=300)
    read_model(best, tmp_path / "run")
    trainer.model.load_state_dict(best.state_dict())
    assert trainer.evaluate().loss == pytest.approx(result.best.loss, rel=1e-6)


def test_packed_documents_train_apart(make_trainer):
    """Targets counted by the trainer are those of the model, so the loss over segments is exact."""
    data = make_data(starts=(0, 100, 333, 500), segments=True)
    model = make_gpt().double().eval()
    trainer = make_trainer(model=model, batch_size=7)
    items = list(data)
    whole = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    evaluation = trainer.evaluate(data)
    assert evaluation.targets == data.num_targets() == 600 - 4
    assert evaluation.loss == pytest.approx(model(**whole).loss.item(), rel=1e-6)


def test_plain_labels_weigh_by_the_targets_there_are(make_trainer):
    """Labels equal to the ids, first column included: micro-batches still count by their number of predictions."""
    model = make_gpt(dropout=0.0).double()
    ids = torch.randint(0, VOCAB, (4, 9))
    labels = ids.clone()
    labels[0, 2:] = -100
    whole = {"input_ids": ids, "labels": labels}
    model(**whole).loss.backward()
    expected = model.wte.weight.grad.clone()
    model.zero_grad()
    make_trainer(model=model).objective.accumulate(
        [{k: v[i : i + 1] for k, v in whole.items()} for i in range(4)]
    )
    torch.testing.assert_close(model.wte.weight.grad, expected, rtol=1e-6, atol=1e-9)


def test_a_block_of_documents_too_short_to_predict_anything_is_harmless(make_trainer):
    data = make_data(starts=tuple(range(600)), segments=True)
    trainer = make_trainer(model=make_gpt(), train=data, max_steps=2)
    assert any("all labels are -100" in r.get("text", "") for r in trainer.fit().log)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
