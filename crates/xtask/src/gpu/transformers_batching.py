"""Generates with transformers' continuous batching and prints output tokens per second as one line of JSON.

    python transformers_batching.py MODEL STREAMS PROMPT_TOKENS OUTPUT_TOKENS

One prompt of random token ids per stream, all at once; greedy, to the full length. A round before warms up, and its
manager is kept, so that captures do not count.
"""

import json
import random
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

model_path, streams, prompt_tokens, output_tokens = sys.argv[1], *map(int, sys.argv[2:5])
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16, attn_implementation="sdpa").to("cuda").eval()
config = GenerationConfig(
    max_new_tokens=output_tokens, min_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
)


def run(seed):
    numbers = random.Random(seed)
    prompts = [[numbers.randrange(256) for _ in range(prompt_tokens)] for _ in range(streams)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    outputs = model.generate_batch(prompts, generation_config=config, progress_bar=False, persistent_manager=True)
    torch.cuda.synchronize()
    return time.perf_counter() - start, sum(len(output.generated_tokens) for output in outputs.values())


run(0)
seconds, tokens = run(1)
print(json.dumps({
    "output_throughput": tokens / seconds,
    "output_tokens": tokens,
    "duration": seconds,
    "transformers": transformers.__version__,
    "torch": torch.__version__,
}), flush=True)
