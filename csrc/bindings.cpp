// The only file that knows about Python: addresses in, the interpreter released, a kernel called.
//
// Tensors come as data_ptr() integers, so nothing here depends on torch or on its version. cpu.py has
// checked dtypes, sizes and contiguity.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "fake_quantization.h"
#include "memory.h"
#include "outlier_statistics.h"
#include "parallel.h"
#include "range_search.h"

namespace py = pybind11;
namespace qt = quanttune;

namespace {

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void fake_quant(Address x, Address scale, Address y, int type, std::int64_t outer,
                std::int64_t channels, std::int64_t inner, int qmin, int qmax, int threads) {
  const qt::Grid grid{at<const float>(scale), outer, channels, inner, qmin, qmax};
  qt::fake_quant(at(x), at(y), qt::Type(type), grid, threads);
}

void dynamic_fake_quant(Address x, Address y, int type, std::int64_t outer, std::int64_t channels,
                        std::int64_t inner, int qmin, int qmax, int threads) {
  const qt::Grid grid{nullptr, outer, channels, inner, qmin, qmax};
  qt::dynamic_fake_quant(at(x), at(y), qt::Type(type), grid, threads);
}

void fake_quant_backward(Address grad, Address x, Address scale, Address grad_x, int type,
                         std::int64_t outer, std::int64_t channels, std::int64_t inner, int qmin,
                         int qmax, int threads) {
  const qt::Grid grid{at<const float>(scale), outer, channels, inner, qmin, qmax};
  qt::fake_quant_backward(at(grad), at(x), at(grad_x), qt::Type(type), grid, threads);
}

void learned_fake_quant_backward(Address grad, Address x, Address scale, Address grad_x,
                                 Address grad_scale, int type, std::int64_t outer,
                                 std::int64_t channels, std::int64_t inner, int qmin, int qmax,
                                 int threads) {
  const qt::Grid grid{at<const float>(scale), outer, channels, inner, qmin, qmax};
  qt::learned_fake_quant_backward(at(grad), at(x), at(grad_x), at<float>(grad_scale),
                                  qt::Type(type), grid, threads);
}

void dynamic_fake_quant_backward(Address grad, Address x, Address grad_x, int type,
                                 std::int64_t outer, std::int64_t channels, std::int64_t inner,
                                 int qmin, int qmax, int threads) {
  const qt::Grid grid{nullptr, outer, channels, inner, qmin, qmax};
  qt::dynamic_fake_quant_backward(at(grad), at(x), at(grad_x), qt::Type(type), grid, threads);
}

double round_again(Address grad, Address x, Address scale, Address y, int type, bool slope,
                   std::int64_t size, int qmin, int qmax, int threads) {
  const qt::Grid grid{at<const float>(scale), 1, 1, size, qmin, qmax};
  return qt::round_again(at(grad), at(x), at(y), qt::Type(type), slope, grid, threads);
}

const qt::Range* ranges_at(Address address, std::int64_t rows, std::int64_t size) {
  const auto* ranges = at<const qt::Range>(address);
  for (std::int64_t row = 0; ranges && row < rows; ++row) {
    const auto [begin, length] = ranges[row];
    if (begin < 0 || length < 0 || begin > size - length)
      throw std::invalid_argument("range of " + std::to_string(length) + " elements from " +
                                  std::to_string(begin) + " on in a sample of " +
                                  std::to_string(size));
  }
  return ranges;
}

void outlier_statistics(Address x, Address statistics, int type, std::int64_t rows,
                        std::int64_t size, bool exact, Address ranges, int threads) {
  qt::outlier_statistics(at(x), at(statistics), qt::Type(type), rows, size, exact,
                         ranges_at(ranges, rows, size), threads);
}

void outlier_statistics_backward(Address grad, Address x, Address statistics, Address ratio_grad,
                                 Address grad_x, int type, std::int64_t rows, std::int64_t size,
                                 bool exact, bool detach_deviation, Address ranges,
                                 int threads) {
  qt::outlier_statistics_backward(at(grad), at(x), at(statistics), at(ratio_grad), at(grad_x),
                                  qt::Type(type), rows, size, exact, detach_deviation,
                                  ranges_at(ranges, rows, size), threads);
}

void quantization_errors(Address x, Address steps, Address errors, int type, std::int64_t size,
                         std::int64_t candidates, int qmin, int qmax, int threads) {
  qt::quantization_errors(at(x), at<const float>(steps), at<double>(errors), qt::Type(type), size,
                          candidates, qmin, qmax, threads);
}

void magnitude_histogram(Address x, Address counts, int type, std::int64_t size, float width,
                         std::int64_t bins, int threads) {
  qt::magnitude_histogram(at(x), at<std::int64_t>(counts), qt::Type(type), size, width, bins,
                          threads);
}

// addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads, of one runtime
void set_openmp(Address parallel, Address thread_num, Address num_threads) {
  qt::openmp = {reinterpret_cast<decltype(qt::OpenMP::parallel)>(parallel),
                reinterpret_cast<decltype(qt::OpenMP::thread_num)>(thread_num),
                reinterpret_cast<decltype(qt::OpenMP::num_threads)>(num_threads)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of quanttune on raw addresses; the last address is written.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("fake_quant", &fake_quant, unlocked);
  m.def("dynamic_fake_quant", &dynamic_fake_quant, unlocked);
  m.def("fake_quant_backward", &fake_quant_backward, unlocked);
  m.def("learned_fake_quant_backward", &learned_fake_quant_backward, unlocked);
  m.def("dynamic_fake_quant_backward", &dynamic_fake_quant_backward, unlocked);
  m.def("round_again", &round_again, unlocked);
  m.def("outlier_statistics", &outlier_statistics, unlocked);
  m.def("quantization_errors", &quantization_errors, unlocked);
  m.def("magnitude_histogram", &magnitude_histogram, unlocked);
  m.def("set_openmp", &set_openmp);
  m.def("prefer_large_pages", &qt::prefer_large_pages);
  m.def("outlier_statistics_backward", &outlier_statistics_backward, unlocked);
}
