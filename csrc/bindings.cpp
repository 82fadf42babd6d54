// The only file that knows about Python: addresses in, the interpreter released, a kernel called.
//
// Tensors come as data_ptr() integers, so nothing here depends on torch or on its version. cpu.py has
// checked dtypes, sizes and contiguity.

#include <pybind11/pybind11.h>

#include "fake_quantization.h"
#include "memory.h"
#include "outlier_statistics.h"

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

void outlier_statistics(Address x, Address statistics, int type, std::int64_t rows,
                        std::int64_t size, bool exact, int threads) {
  qt::outlier_statistics(at(x), at(statistics), qt::Type(type), rows, size, exact, threads);
}

void outlier_statistics_backward(Address grad, Address x, Address statistics, Address ratio_grad,
                                 Address grad_x, int type, std::int64_t rows, std::int64_t size,
                                 bool exact, bool detach_deviation, int threads) {
  qt::outlier_statistics_backward(at(grad), at(x), at(statistics), at(ratio_grad), at(grad_x),
                                  qt::Type(type), rows, size, exact, detach_deviation, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of quanttune on raw addresses; the last address is written.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("fake_quant", &fake_quant, unlocked);
  m.def("dynamic_fake_quant", &dynamic_fake_quant, unlocked);
  m.def("fake_quant_backward", &fake_quant_backward, unlocked);
  m.def("outlier_statistics", &outlier_statistics, unlocked);
  m.def("prefer_large_pages", &qt::prefer_large_pages);
  m.def("outlier_statistics_backward", &outlier_statistics_backward, unlocked);
}
