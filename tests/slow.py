"""What `make test` leaves out and `make test-all` runs: what another test holds already.

By file and test (* is each test of the file): the parameters that are left out, or None for the
test as a whole. Beside each stays one of its kind, which takes less time, or breaks more easily.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

# fmt: off
SLOW: dict[str, dict[str, list[str] | None]] = {
    "test_ahead_of_time": {"*": ["sm_90"]},  # it has the most cases; those of two others stay
    "test_analyze_command": {
        "test_a_model_and_its_data_are_analysed": ["opt_case", "vit_case"],
        "test_a_recipe_is_analysed_beside_an_arm": None,  # test_tune_command has the recipe
    },
    "test_bench_command": {
        "test_the_float_file_is_what_torch_makes_of_the_model": None,  # test_benchmarks exports it
        "test_models_that_methods_changed_are_timed": None,
        "test_a_language_model_that_caches_is_timed": None,  # its answers are compared
    },
    "test_benchmarks": {
        "test_the_gpu_suite_runs_dry": None,  # one section of it does
        "test_benchmarks_run_on_their_smallest_shapes": None,
        "test_files_are_exported_checked_and_timed": None,  # test_bench_command
    },
    "test_compile": {
        "test_one_graph_has_the_gradient_of_every_alpha": ["opt-1"],
        "test_a_forward_in_several_graphs_is_right_or_refused": ["4"],
        "test_models_of_one_class_with_and_without_a_tuner": None,
        "test_many_forwards_of_one_loss": None,  # test_a_module_that_is_called_three_times
        "test_without_a_forward_before_it_says_what_to_do": None,
        "test_a_compiled_model_can_be_attached_and_accumulates": None,
        "test_evaluation_of_a_compiled_model_leaves_nothing_behind": None,
    },
    "test_compiled_quantized": {
        "test_a_whole_graph_has_the_numbers_of_eager": ["bert-eager", "opt-eager"],
    },
    "test_cpu_kernels": {
        "test_every_instruction_set_gives_the_same_bits": None,  # half a minute to compile, each
        "test_calls_leave_memory_flat": ["shape0-5000"],
        "test_fake_quant_beyond_two_to_the_31": ["fake_quant_backward-0"],
        "test_the_gradient_of_a_row_of_billions": None,
        "test_statistics_of_rows_beyond_two_to_the_31": None,
    },
    "test_demo": {"test_docstring_splits_share_neither_text_nor_module": None},
    "test_encoder_decoder": {"*": ["bart", "marian"]},  # t5 reads tokens, and whisper hears
    "test_equalized_models": {
        "test_a_file_gives_the_same_bits": [
            "opt-smoothquant", "bert-outlier_suppression", "opt after-smoothquant",
        ],
        "test_an_equalized_model_is_exported": None,  # test_smooth_inputs exports factors
    },
    "test_export": {
        "*": [
            "('vit', 7, 'linear')", "('opt', 6, 'linear')", "('opt', 8, 'full')",
            "('deit', 7, 'full')", "('swin', 8, 'full')",
        ],
    },
    "test_export_external": {
        "test_killed_at_any_step_the_older_or_the_newer_is_there": ["1073741824"],
    },
    "test_export_options": {
        "test_all_widths_run_as_simulated": [
            "6-12-Words", "6-12-Pixels", "6-12-Shared", "12-8-Pixels", "12-8-Shared", "8-4-Pixels",
        ],
        "test_zero_points_are_ours": ["8-int8", "5-uint8"],
        "test_integer_weights_are_those_of_the_simulation": [
            f"{module}-{bits}-{weights}"
            for module, bits in (("Words", 8), ("Pixels", 4), ("Shared", 12))
            for weights in ("channel", "tensor")
        ],
    },
    "test_export_sizes": {
        "test_files_run_at_every_pair_of_lengths": ["bart", "captioner", "t5"],
        "test_caches_of_any_part_are_left_out_of_programs_too": None,
    },
    "test_habits": {"test_a_spawned_process_gets_a_quantized_model": None},  # test_saving has one
    "test_installed": {"test_forked_children_work_alone": ["data.mul(2)"]},
    "test_interpreter": {
        "test_statistics_of_every_kind": ["1023-dtype1", "1023-dtype2", "3075-dtype0"],
        "test_median_of_neighbouring_floats": ["7-False", "7-True", "1025-True"],
        "test_statistics_of_bad_rows": ["dtype1"],
        "test_exact_statistics_beyond_the_registers": ["dtype1"],
    },
    "test_interpreter_padding": {
        "test_statistics": ["False-False-37", "False-True-32", "True-False-32", "True-True-32"],
        "test_gradient": ["9-True-False-32", "9-True-True-37", "300-False-True-32"],
    },
    "test_labels_and_data": {
        "test_the_model_keeps_the_names_of_the_labels": [
            "labels1-expected1", "labels2-expected2", "labels3-expected3",
        ],
    },
    "test_layer_by_layer": {
        "test_equals_a_pass_for_each_layer": [
            f"{model}-{method}"
            for model in ("deit", "opt", "gpt2") for method in ("gptq", "bias_correction")
        ],
    },
    "test_lightning_callback": {"test_a_compiled_model": None},
    "test_losses": {"test_one_compiled_graph": ["of rows"]},
    "test_masks": {"test_one_compiled_graph_serves_every_mask": None},  # test_compile, and eager
    "test_methods": {
        "test_weights_end_on_a_constant_grid_and_outputs_are_nearer": [
            f"{model}-{bits}-{method}"
            for model in ("swin", "bert", "gpt2") for method in ("gptq", "erq")
            for bits in ("W8A8", "W6A6")
        ],
        # three of one kind: ptq4vit stays, with its grids, on a model of each library
        "test_a_model_that_is_loaded_computes_the_same_bits": [
            *(f"{model}-{method}" for method in ("ranking", "base_ptq")
              for model in ("vit", "swin", "bert", "opt", "deit", "gpt2")),
            "swin-ptq4vit", "deit-ptq4vit", "gpt2-ptq4vit",
            "swin-apq_vit", "deit-apq_vit", "opt-apq_vit", "gpt2-apq_vit",
        ],
        "test_tied_weights_embeddings_and_convolutions_are_rounded_to_nearest": [
            *(f"{model}-{method}" for method in ("ranking", "base_ptq")
              for model in ("vit", "opt", "gpt2")),
            "opt-ptq4vit",
        ],
        "test_a_layer_whose_input_stays_float_is_rounded_as_behind_a_very_fine_grid": [
            "base_ptq", "ranking",
        ],
    },
    "test_onnx_readers": {
        "test_every_product_is_one_of_integers": ["opt-8", "swin-6"],
        "test_the_file_computes_the_simulation": ["swin"],
    },
    "test_openvino": {
        "test_openvino_computes_the_simulation": ["bert-6-int8"],
        "test_every_product_is_one_of_integers": [
            "vit-static", "bert-dynamic", "swin-dynamic", "swin-static",
        ],
        "test_class_tokens_beside_rounded_patches": ["deit"],
    },
    "test_ops": {"test_a_missing_backend_is_said_once_and_replaced": ["triton without a GPU"]},
    "test_products": {"test_products_in_float_have_their_reason": ["coverage", "probabilities"]},
    "test_quantization_docs": {"test_a_snippet": ["8"]},  # torch.compile: test_compiled_quantized
    "test_reproduce_command": {
        "test_a_killed_process_goes_on": None,  # one that is interrupted does
        "test_random_weights_are_drawn_once": ["table3-opt_350m-options1"],
    },
    "test_resumed_runs": {
        "test_a_checkpoint_that_changed_is_skipped": [
            "{", "[]", "nested", "no list of files", "no file", "state",
        ],
    },
    "test_sharded": {
        "test_the_gradient_is_that_of_one_process": [
            f"{model}-{way}"
            for model, ways in {
                "vit": ["fsdp", "fsdp-checkpoints", "fsdp-reentrant"],
                "swin": ["ddp", "fsdp", "fsdp-checkpoints", "fsdp-reentrant"],
                "opt": [
                    "ddp", "fsdp", "fsdp-checkpoints", "fsdp-reentrant", "ddp-uneven", "bfloat16",
                    "fsdp-checkpoints-attached-first", "trainer",
                ],
                "bert": [
                    "fsdp-checkpoints-attached-first", "fsdp-in-wrappers", "fsdp-uneven",
                    "accelerate-checkpoints", "fsdp-micro-batches", "ddp-scale", "fsdp-balance",
                    "accelerate-attached-first", "ddp-attached-first", "fsdp-reentrant",
                    "static_graph", "find_unused_parameters",
                ],
            }.items() for way in ways
        ],
    },
    "test_statistics_group": {
        "test_a_group_has_the_bits_of_one_tensor_at_a_time": ["256"],
        "test_a_model_s_sites_are_merged_at_the_end_of_its_forward": ["copied"],
    },
    "test_torch_export": {
        "test_the_program_computes_the_simulation": ["bert-6-linear", "vit-6-full"],
        "test_all_schemes_run_as_simulated": ["{'bits': 12}", "{'weight_bits': 12}"],
    },
    "test_trainer": {
        "test_a_compiled_model": None,
        "test_a_resumed_training_is_the_same": ["none"],
    },
    "test_training_docs": {
        "test_the_snippets_for_two_processes": None, "test_a_snippet_for_one_process": ["compile"],
    },
    "test_tune_command": {
        "test_a_killed_run_ends_with_the_same_bits": [
            "before the first checkpoint, otherwise", "between two checkpoints",
            "with a checkpoint not marked", "before the model has its name", "three times",
        ],
    },
    "test_verify": {
        "test_a_right_file_passes": [
            "('vit', {'bits': 6}, 'int8')", "('shared', {'bits': 8}, 'uint8')",
        ],
        "test_shares_are_those_that_numpy_counts": ["('vit', {'bits': 6}, 'int8')"],
        "test_keys_that_a_group_shares_are_compared": ["2-False-batches1"],
    },
    "test_verify_command": {"*": ["opt_case", "vit_case"]},
    "test_wheel": {"test_the_doctors_remedy_builds_the_extension": None},
}
# fmt: on


def mark(items: Iterable[Any], complete: bool) -> None:
    """Mark what is slow; where all tests were collected, refuse entries that no test has."""
    entries, found = set(_entries()), set()
    for item in items:
        own = {None, item.callspec.id} if hasattr(item, "callspec") else {None}
        of_item = {(item.path.stem, name, one) for name in (item.originalname, "*") for one in own}
        if slow := of_item & entries:
            item.add_marker(pytest.mark.slow)
            found |= slow
    if complete and entries != found:
        raise pytest.UsageError(f"no test is what tests/slow.py has: {entries - found}")


def _entries() -> Iterator[tuple[str, str, str | None]]:
    for file, tests in SLOW.items():
        for test, parameters in tests.items():
            yield from ((file, test, one) for one in parameters or [None])


def wanted(request: Any, argument: str) -> list[Any]:
    """Return the values of a parameter that are to run, for a fixture that does all at once."""
    given = [
        item.callspec.params.get(argument)
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    return list(dict.fromkeys(given))
