"""Run the tests of TRL's `DPOTrainer` on fastdpo's, with the import swapped, and count how each of them ends.

    python -m tests.reliability.trl_dpo_suite CHECKOUT [--ref v1.16.0] [-k EXPRESSION] [--json FILE]

CHECKOUT is a clone of https://github.com/huggingface/trl, bare or not. The script takes TRL's test file from it,
imports `DPOConfig` and `DPOTrainer` from fastdpo instead, and puts tiny models with random weights and made-up rows of
the same shape in the place of the models and datasets that the tests load from the Hub, so no network is needed. This
file contains none of TRL's code. One model stands for all vision models. The tests take a few minutes; each ends as:

- passed: the test passes as it is.
- refused: fastdpo raises an error of its own, which is a sentence; where the test expects a refusal, in other words.
- accepted: fastdpo does what the test expects to be refused.
- differs: an assertion of the test fails, or a warning that it expects does not come.
- raw error: anything else. There must be none.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HUB = "trl-internal-testing"
FILES = ("test_dpo_trainer.py", "testing_utils.py", "testing_constants.py", "__init__.py")
OWN = "from trl import DPOConfig, DPOTrainer"
VISION = ("Gemma3", "Gemma4", "Llava", "LlavaNext", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5", "Qwen3_5Moe")
SUFFIXES = {"Qwen3_5": "-NoThink", "Qwen3_5Moe": "-3.6"}
TEMPLATE = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.thinking or '' }}{{ m.content or '' }}"
    "{%- for call in m.tool_calls or [] -%}<tool_call>{{ call.function | tojson }}</tool_call>{%- endfor -%}"
    "<|im_end|>\n{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
REMOTE = (
    "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
    "class RemoteConfig(LlamaConfig):\n    model_type = 'remote'\n\n\n"
    "class RemoteForCausalLM(LlamaForCausalLM):\n    config_class = RemoteConfig\n"
)


# The tests' models and data


def save_models(folder: Path) -> None:
    """Save what the tests load from the Hub in a folder from which `from_pretrained` takes it by the same name."""
    import torch
    import transformers as t

    tokenizer = make_tokenizer()
    sizes: dict[str, Any] = {
        **{"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 2048},
        **{"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None},
        "tie_word_embeddings": False,
    }
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    mixers = {"hybrid_override_pattern": "M*", "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8}
    convs = {"layer_types": ["conv", "full_attention"]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    rope = {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 1e4}
    torch.manual_seed(0)
    models = {
        "Qwen2ForCausalLM-2.5": t.Qwen2ForCausalLM(t.Qwen2Config(**sizes)),
        "GptOssForCausalLM": t.GptOssForCausalLM(t.GptOssConfig(**sizes | experts)),
        "Qwen3MoeForCausalLM": t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**sizes | experts)),
        "Cohere2ForCausalLM": t.Cohere2ForCausalLM(t.Cohere2Config(**sizes)),
        "Glm4MoeForCausalLM": t.Glm4MoeForCausalLM(t.Glm4MoeConfig(**sizes | experts)),
        "NemotronHForCausalLM-nano": t.NemotronHForCausalLM(t.NemotronHConfig(**sizes | mixers | {"n_groups": 1})),
        "Olmo3ForCausalLM": t.Olmo3ForCausalLM(t.Olmo3Config(**sizes)),
        **{f"Lfm2ForCausalLM{end}": t.Lfm2ForCausalLM(t.Lfm2Config(**sizes | convs)) for end in ("", "-2.5")},
        "RemoteForCausalLM": t.LlamaForCausalLM(t.LlamaConfig(**sizes)),
    }
    seeing = t.Qwen2_5_VLConfig(text_config=sizes | {"rope_parameters": rope}, vision_config=vision)
    names = [f"{name}ForConditionalGeneration{SUFFIXES.get(name, '')}" for name in VISION]
    models |= dict.fromkeys(names, t.Qwen2_5_VLForConditionalGeneration(seeing))
    for name, model in models.items():
        for each in (model, tokenizer):
            each.save_pretrained(folder / HUB / f"tiny-{name}")
    remote = folder / HUB / "tiny-RemoteForCausalLM"
    (remote / "remote.py").write_text(REMOTE)
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    (remote / "config.json").write_text(json.dumps(config))


def make_tokenizer() -> Any:
    """A tokenizer of bytes with the special tokens of chat models; it adds no BOS token, as Qwen's adds none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1])
    fast.add_special_tokens({"additional_special_tokens": special[2:]})
    fast.chat_template = TEMPLATE
    return fast


def load_dataset(name: str, config: str, split: str | None = None, streaming: bool = False) -> Any:
    """Stand in for `datasets.load_dataset`: 17 rows to train on, 2 to evaluate, of the shape that the name has."""
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([make_row(i, name.partition("/")[2], config) for i in range(19)])
    splits = DatasetDict({"train": rows.select(range(17)), "test": rows.select(range(17, 19))})
    found = splits if split is None else splits[split]
    return found.to_iterable_dataset() if streaming else found


def make_row(i: int, dataset: str, config: str) -> dict[str, Any]:
    """Make row `i`; the chosen answer is the sum, the rejected one is not."""
    question, good, bad = f"What is {i} plus {i}?", f" It is {2 * i}.", f" I guess {2 * i + 1 + i % 3}."
    if "unpaired" in config:
        return {"prompt": question, "completion": good if i % 2 else bad, "label": bool(i % 2)}
    if config.startswith("standard"):
        start = question if "implicit" in config else ""
        return ({} if start else {"prompt": question}) | {"chosen": start + good, "rejected": start + bad}
    prompt: list[dict[str, Any]] = [{"role": "user", "content": question}]
    answers: list[list[dict[str, Any]]] = [[{"role": "assistant", "content": text}] for text in (good, bad)]
    if dataset == "harmony":
        answers = [[turn | {"thinking": f"Doubling {i}."} for turn in answer] for answer in answers]
    if dataset == "toolcall":
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": i, "b": i}}}
        used = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "name": "add", "content": str(2 * i)}]
        answers[0] = used + answers[0]
    row: dict[str, Any] = {"chosen": answers[0], "rejected": answers[1]}
    row = {key: prompt + turns for key, turns in row.items()} if "implicit" in config else {"prompt": prompt} | row
    if "image" in dataset:
        from PIL import Image

        picture = Image.new("RGB", (32, 32), (i, 2 * i, 3 * i))
        row |= {"images": [picture] * 2} if "multi" in dataset else {"image": picture}
    if dataset == "harmony":
        row["chat_template_kwargs"] = {"reasoning_effort": "low"}
    if dataset == "toolcall":
        row["tools"] = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
    return row


# pytest's hooks, for this file is the plug-in of the run as well


def pytest_configure() -> None:
    """Replace `load_dataset` before the tests import it; what the installed TRL does not ask for is not installed."""
    import datasets
    from trl import import_utils

    datasets.load_dataset = load_dataset
    vars(import_utils)["__getattr__"] = lambda name: lambda: False


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave out the tests of TRL's own collators, in which nothing of fastdpo runs."""
    items[:] = [item for item in items if "Collator" not in item.nodeid]


def pytest_runtest_makereport(item: Any, call: Any) -> None:
    """Write how a test ended as a line of JSON."""
    if call.when == "teardown" or (call.when == "setup" and call.excinfo is None):
        return
    result, words = ("passed", "") if call.excinfo is None else outcome(call.excinfo)
    with Path(os.environ["FASTDPO_TRL_SUITE"]).open("a") as file:
        file.write(json.dumps({"test": item.nodeid.partition("::")[2], "result": result, "words": words}) + "\n")


def outcome(found: Any) -> tuple[str, str]:
    """Return how a test that raised ended, and the words of its error."""
    error, words = found.value, " ".join(str(found.value).split())
    name = type(error).__name__
    if name == "Skipped":
        return "skipped", words
    if name == "Failed" and words.startswith("DID NOT RAISE"):
        return "accepted", words
    context = error.__context__
    if isinstance(error, AssertionError) and isinstance(context, Exception) and "did not match" in words:
        return ("refused", " ".join(str(context).split())) if is_ours(context) else ("raw error", words)
    if isinstance(error, AssertionError) or words.startswith("DID NOT WARN"):
        return "differs", words
    return "refused" if is_ours(error) else "raw error", f"{name}: {words}"


def is_ours(error: BaseException) -> bool:
    """Return whether a `raise` statement of fastdpo raised the error, as it does for what a user can mend."""
    from fastdpo.settings.failures import one_line

    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    inside = trace is not None and "fastdpo" in Path(trace.tb_frame.f_code.co_filename).parts
    return inside and (one_line(error) is not None or isinstance(error, TypeError))


# The run


def main() -> int:
    """Run the tests and print the counts; return 1 if a test ended in a raw error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--ref", default="HEAD", help="tag or commit of the checkout")
    parser.add_argument("-k", default="", help="run the tests that pytest's expression selects")
    parser.add_argument("--json", type=Path, help="write how each test ends to this file, one by one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tests_of_trl").mkdir()
        for file in FILES:
            git = ["git", "-C", str(args.checkout), "show", f"{args.ref}:tests/{file}"]
            source = subprocess.run(git, check=True, capture_output=True, text=True).stdout
            if file == FILES[0] and OWN not in source:
                sys.exit(f"tests/{file} of {args.ref} has no line {OWN!r}, so its import can't be swapped")
            (folder / "tests_of_trl" / file).write_text(source.replace(OWN, OWN.replace("trl", "fastdpo")))
        (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
        save_models(folder)
        results = (args.json or folder / "results.jsonl").absolute()
        results.unlink(missing_ok=True)
        env = os.environ | {
            **{"FASTDPO_TRL_SUITE": str(results), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            **{"HF_HOME": str(folder / "hub"), "XDG_CACHE_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""},
        }
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tests.reliability.trl_dpo_suite",
            "--tb=line",
            "-k",
            args.k,
        ]
        subprocess.run([*words, "-p", "no:cacheprovider", "tests_of_trl"], cwd=folder, env=env, check=False)
        if not results.exists():
            sys.exit("pytest ran no test; its messages are above")
        rows = [json.loads(line) for line in results.read_text().splitlines()]
    for row in rows:
        if row["result"] not in ("passed", "skipped"):
            print(f"{row['result']}: {row['test']}\n    {row['words'][:400]}")  # noqa: T201
    counts = collections.Counter(row["result"] for row in rows)
    print(", ".join(f"{count} {result}" for result, count in counts.most_common()))  # noqa: T201
    return int(counts["raw error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
