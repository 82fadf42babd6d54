// Threads: those of the OpenMP runtime that torch has already loaded, as many as torch asks for.
//
// Nothing is linked: where torch's runtime has another file name than the compiler's, that would bring a
// second one into the process. cpu.py hands over the addresses. The names are GNU's, and LLVM's and
// Intel's runtimes answer to them too.

#pragma once

#include <pthread.h>

#include <cstdint>

namespace quanttune {

// A forked child (a DataLoader worker) has none of its parent's threads, and GNU OpenMP waits for them
// forever; such a process works alone. Registered at load: torch may use the threads before we do.
inline bool is_forked_child = false;
inline const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

struct OpenMP {
  void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
};
inline OpenMP openmp{};  // none: all tasks on the thread that calls

template <class Body>
void parallel_for(std::int64_t tasks, int threads, Body body) {
  if (threads <= 1 || tasks <= 1 || is_forked_child || !openmp.parallel) {
    for (std::int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  struct Work {
    Body& body;
    std::int64_t tasks;
  } work{body, tasks};
  const auto share = [](void* data) {
    const auto& [body, tasks] = *static_cast<Work*>(data);
    const std::int64_t thread = openmp.thread_num(), threads = openmp.num_threads();
    const std::int64_t end = tasks * (thread + 1) / threads;
    for (std::int64_t task = tasks * thread / threads; task < end; ++task) body(task);
  };
  openmp.parallel(share, &work, static_cast<unsigned>(threads), 0);
}

}  // namespace quanttune
