"""SGLang's offline engine with adapters loaded and unloaded; prints answers and facts."""

import json
import sys


def main():
    import sglang
    from safetensors.torch import load_file

    given = json.loads(sys.argv[1])
    adapters, prompt = given["adapters"], given["prompt"]
    names = list(adapters)
    engine = sglang.Engine(
        model_path=given["checkpoint"],
        dtype="float32",
        max_total_tokens=8000,
        lora_paths={names[0]: adapters[names[0]]},
        max_loaded_loras=3,
        max_lora_rank=64,
        lora_target_modules=["all"],
        log_level="error",
    )
    answers, facts = [], {}

    def ask(*names, **options):
        sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        options |= {"sampling_params": sampling, "lora_path": list(names)}
        found = engine.generate(input_ids=[prompt] * len(names), **options)
        answers.extend((name, each["output_ids"]) for name, each in zip(names, found, strict=True))
        return found

    def load(name, **options):
        return engine.load_lora_adapter(name, adapters[name], **options)

    ask(None, names[0])
    facts["loaded"] = [load(name).success for name in names[1:]]  # more than three in all
    for name in names:
        ask(name)  # evicted ones are loaded again
    ask(None, *names[:2])
    facts["unloaded"] = engine.unload_lora_adapter(names[1]).success
    try:
        ask(names[1])
    except ValueError as error:
        facts["asked for it"] = str(error)
    facts["loaded again"] = load(names[1], pinned=True).success
    ask(names[0], names[1])
    missing = engine.load_lora_adapter("missing", "/nowhere")
    facts["missing"] = [missing.success, missing.error_message]
    engine.unload_lora_adapter(names[0])
    tensors = load_file(f"{adapters[names[0]]}/adapter_model.safetensors")
    config = json.load(open(f"{adapters[names[0]]}/adapter_config.json"))
    facts["sent"] = engine.load_lora_adapter_from_tensors(names[0], tensors, config).success
    found = ask(names[0], names[1], return_logprob=True, logprob_start_len=0)
    facts["logprobs"] = [
        [logprob for logprob, *_ in each["meta_info"]["input_token_logprobs"][1:]] for each in found
    ]
    print("facts " + json.dumps([answers, facts]), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
