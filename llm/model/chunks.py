"""How much is done at once. Apart from the code that does it, since planning reads it too, and without torch."""

CPU_CHUNK, GPU_CHUNK = 1 << 26, 1 << 28  # logits at once: 2,048 rows of 32k make good products, and few sums of weight gradients
CPU_SLICE, GPU_SLICE = 1 << 19, 1 << 26  # logits read at once: 2 MB in fp32 stay in a CPU's cache; a GPU wants few launches
EAGER_QUERIES = 128  # of eager attention at a time; 64 is hardly faster
BUCKET_ELEMENTS = 80_000_000  # gradients that DeepSpeed sends at once
