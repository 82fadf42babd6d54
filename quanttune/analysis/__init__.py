"""Why a model is hard to quantize, before and after: numbers, figures, the report."""
