def fake_quant(
    x: int,
    scale: int,
    y: int,
    type: int,
    outer: int,
    channels: int,
    inner: int,
    qmin: int,
    qmax: int,
    threads: int,
    /,
) -> None: ...
def dynamic_fake_quant(
    x: int,
    y: int,
    type: int,
    outer: int,
    channels: int,
    inner: int,
    qmin: int,
    qmax: int,
    threads: int,
    /,
) -> None: ...
def fake_quant_backward(
    grad: int,
    x: int,
    scale: int,
    grad_x: int,
    type: int,
    outer: int,
    channels: int,
    inner: int,
    qmin: int,
    qmax: int,
    threads: int,
    /,
) -> None: ...
def outlier_statistics(
    x: int,
    statistics: int,
    type: int,
    rows: int,
    size: int,
    exact: bool,
    ranges: int,
    threads: int,
    /,
) -> None: ...
def outlier_statistics_backward(
    grad: int,
    x: int,
    statistics: int,
    ratio_grad: int,
    grad_x: int,
    type: int,
    rows: int,
    size: int,
    exact: bool,
    detach_deviation: bool,
    ranges: int,
    threads: int,
    /,
) -> None: ...
def quantization_errors(
    x: int,
    steps: int,
    errors: int,
    type: int,
    size: int,
    candidates: int,
    qmin: int,
    qmax: int,
    threads: int,
    /,
) -> None: ...
def magnitude_histogram(
    x: int, counts: int, type: int, size: int, width: float, bins: int, threads: int, /
) -> None: ...
def prefer_large_pages(address: int, bytes: int, /) -> None: ...
def set_openmp(parallel: int, thread_num: int, num_threads: int, /) -> None: ...
