#include "common/parallel.h"

#include <atomic>
#include <exception>
#include <mutex>

#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif
#if __has_include(<pthread.h>)
#include <pthread.h>
#define GOSSAMER_HAS_FORK
#endif

namespace gossamer {
namespace {

std::atomic<bool> forked_child{false};

#ifdef GOSSAMER_HAS_FORK
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked_child.store(true, std::memory_order_relaxed); });
#endif

class FirstException {
 public:
  template <class Body>
  void guard(const Body& body) {
    try {
      body();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!first_) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

}  // namespace

void parallel_run(int threads, const std::function<void(int, int)>& body) {
  if (threads <= 1 || forked_child.load(std::memory_order_relaxed)) {
    body(0, 1);
    return;
  }
  FirstException failure;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  failure.guard([&] { body(omp_get_thread_num(), omp_get_num_threads()); });
#else
  std::vector<std::thread> team;
  failure.guard([&] {  // where the system has no more threads, those that started are joined
    for (int t = 1; t < threads; ++t) {
      team.emplace_back([&, t] { failure.guard([&] { body(t, threads); }); });
    }
    body(0, threads);
  });
  for (std::thread& thread : team) thread.join();
#endif
  failure.rethrow();
}

}  // namespace gossamer
