"""Settings that belong to a model and its problems, by name: `python train.py --recipe words`.
Flags that are given override them."""

RECIPES = {
    # the embedded default: minutes on two CPU cores, nothing to download
    "tiny": dict(
        data="tiny",
        eval_data="tiny,tiny-long",
        system="",
        bupo_layer="3",
        bupo_steps="15",
        steps=60,
        prompts=32,
        group=8,
        mini_prompts=16,
        lr=1e-4,
        max_new_tokens=64,
        max_prompt_tokens=32,
        slots=256,
        micro_tokens=4096,
        save_every=10,
        eval_every=10,
        eval_limit=256,
        watch_layers=5,
    ),
    # the second thing to do: a real pretrained model, word problems of one operation, less than ten
    # minutes on two idle CPU cores. At temperature 1 so small a model rambles
    "words": dict(
        model="smollm2-135m-instruct",
        data="words",
        eval_data="words-test",
        eval_limit=128,
        system="Be brief.",
        temperature=0.7,
        max_new_tokens=48,
        max_prompt_tokens=128,
        prompts=10,
        mini_prompts=10,
        group=8,
        steps=14,
        lr=2e-5,
        slots=80,
        micro_tokens=2048,
        save_every=14,
    ),
    # what everybody asks for, sized for one 24 GB card; not yet run. Others take .29 to .50 in 20
    # steps and .69 in 50 with it
    "gsm8k": dict(
        model="qwen3-0.6b",
        data="gsm8k",
        eval_data="gsm8k-test",
        eval_limit=1319,
        eval_every=10,
        max_new_tokens=1024,
        max_prompt_tokens=512,
        prompts=32,
        mini_prompts=32,
        group=4,
        steps=50,
        lr=1e-6,
        save_every=25,
    ),
}
