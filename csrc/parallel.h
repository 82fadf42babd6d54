// Threads: those of the OpenMP runtime that torch has already loaded, as many as torch asks for.

#pragma once

#include <pthread.h>

#include <cstdint>

namespace quanttune {

// A forked child (a DataLoader worker) has none of its parent's threads, and GNU OpenMP waits for them
// forever; such a process works alone. Registered at load: torch may use the threads before we do.
inline bool is_forked_child = false;
inline const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

template <class Body>
void parallel_for(std::int64_t tasks, int threads, Body body) {
  if (threads <= 1 || tasks <= 1 || is_forked_child) {
    for (std::int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t task = 0; task < tasks; ++task) body(task);
}

}  // namespace quanttune
