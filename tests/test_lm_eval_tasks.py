"""lm_eval measures a quantized language model as it is, without the network."""

import json
import math

import datasets
import pytest
import torch
from cases import save_tokenizer
from models import MODELS
from torch.nn import functional as F
from transformers import AutoTokenizer

import quanttune as qt

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval")

TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
"""


# what it warns of is its own
@pytest.mark.filterwarnings("ignore")
def test_the_perplexity_of_a_quantized_model_is_that_of_a_plain_loop(tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = ["w1 w2 w3 w4", "w5 w6 w7"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "words.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    example = MODELS["opt"]()
    model = qt.quantize(example.model.eval(), 5, data=[example.inputs])
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=16, device="cpu")
    found = lm_eval.simple_evaluate(
        wrapped,
        tasks=["words"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["words"]["word_perplexity,none"]
    loss = 0.0
    for text in texts:
        ids = wrapped.tok_encode(text)
        rows = torch.tensor([[wrapped.prefix_token_id, *ids]])
        with torch.no_grad():
            logits = model(rows).logits[0, :-1].double()
        loss += F.cross_entropy(logits, rows[0, 1:], reduction="sum").item()
    words = sum(len(text.split()) for text in texts)
    assert found == pytest.approx(math.exp(loss / words), rel=1e-4)
