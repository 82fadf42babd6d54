"""The rows of the speed tables: what is compared, the bar and the goal."""

from typing import NamedTuple


class Bar(NamedTuple):
    """A ratio to reach. `at_least`: how many times faster we are; else how many times a floor."""

    what: str
    bar: float
    goal: float
    at_least: bool
    bfloat16: float | None = None  # the bar at bfloat16, where it is another

    def met(self, ratio: float, dtype: str = "float32") -> bool:
        """Tell whether a ratio reaches the bar."""
        bar = self.bfloat16 if dtype == "bfloat16" and self.bfloat16 else self.bar
        return ratio >= bar if self.at_least else ratio <= bar

    def text(self, goal: bool = False) -> str:
        """Return the bar, or the goal, as it stands in a table."""
        second = f", {self.bfloat16:g}x" if self.bfloat16 and not goal else ""
        return f"{'≥' if self.at_least else '≤'} {self.goal if goal else self.bar:g}x{second}"


BARS = {
    "statistics_vs_eager": Bar("statistics, speed over plain PyTorch", 60, 120, True),
    "statistics_small_vs_eager": Bar("the same on 16 x 36,864, median exact", 10, 25, True),
    "statistics_vs_read": Bar(
        "statistics, time in units of x.sum()", 1.1, 1.05, False, bfloat16=1.25
    ),
    "statistics_under_load": Bar(
        "beside two busy processes, what they lose in units of what x.sum() does", 1.3, 1.1, False
    ),
    "step_vs_eager": Bar("forward + backward, speed over plain PyTorch", 20, 25, True),
    "fake_quant_vs_torch": Bar("fake quantization, speed over torch's", 2, 4, True),
    "fake_quant_inplace_vs_copy": Bar("the same in place, in units of a copy", 1.5, 1.2, False),
    "minilm_step_overhead": Bar("MiniLM training step, with over without", 1.08, 1.05, False),
    "minilm_short_overhead": Bar("the same with 16 x 24 tokens", 1.15, 1.08, False),
    "minilm_memory_overhead": Bar("its peak memory, with over without", 1.02, 1.01, False),
    "smollm2_step_overhead": Bar("SmolLM2 training step, 4 x 128 tokens", 1.1, 1.05, False),
    "omse_vs_loop": Bar("OMSE, speed over a loop of torch's fake quantization", 20, 40, True),
    "calibrate_vs_forward": Bar("ViT-B, every site's range, in float forwards", 2, 1.5, False),
    "search_vs_forward": Bar("the same by search (mse, omse or kl)", 3.5, 3, False),
}

# On one H200, bfloat16. Half of an overhead is the goal.
GPU_BARS = {
    "forward_vs_read": Bar(
        "statistics, bandwidth in units of a read, from 134 MB", 0.85, 0.95, True
    ),
    "backward_vs_copy": Bar("its gradient, in units of a copy, from 134 MB", 0.88, 0.95, True),
    "step_vs_eager": Bar("forward + backward, speed over plain PyTorch", 50, 100, True),
    "fake_quant_vs_torch": Bar("fake quantization, speed over torch's", 1.8, 2.5, True),
    "step ViT-B": Bar("ViT-B training step, with over without", 1.30, 1.15, False),
    "step OPT-350m": Bar("OPT-350m", 1.15, 1.075, False),
    "step OPT-1.3B": Bar("OPT-1.3B", 1.09, 1.045, False),
    "step OPT-6.7B": Bar("OPT-6.7B, its width", 1.055, 1.0275, False),
}
# In ONNX Runtime, W8A8 beside the float model's file. Each coverage has to reach a bar.
ONNX_ROWS = {
    "vit_speed_1": "ViT-tiny, 8 images: speed over float, 1 thread",
    "vit_speed_2": "2 threads",
    "vit_bytes": "its file, in units of the float file",
    "minilm_speed_1": "tuned MiniLM, 8 x 128 tokens: speed over float, 1 thread",
    "minilm_speed_2": "2 threads",
    "minilm_bytes": "its file, in units of the float file",
}
ONNX_BARS = {
    "vit_speed_1": Bar(ONNX_ROWS["vit_speed_1"], 1.3, 1.6, True),
    "minilm_bytes": Bar(ONNX_ROWS["minilm_bytes"], 0.4, 0.3, False),
}
