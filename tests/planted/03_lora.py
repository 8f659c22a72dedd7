"""Wrong answers to chapter 3's exercises: (exercise, what its message must say, the answer)."""

PLANTED = [
    ("lora_delta", "divide alpha by the rank", 
     lambda x, A, B, alpha, use_rslora=False: alpha * x @ A.T @ B.T),
]
