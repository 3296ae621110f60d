#pragma once
// Atomic operations, under their CUDA names. One OS thread runs everything, so each is plain code;
// a random schedule lets others run after it. One that changed nothing counts as a poll: it is how
// a lock or a flag is waited for.
#include "twins/cuda_language.h"

namespace gossamer::emulation {

template <class T, class... Types>
constexpr bool kIsOneOf = (std::is_same_v<T, Types> || ...);
template <class T>
constexpr bool kIsAtomicInteger = kIsOneOf<T, int, unsigned, unsigned long long>;

template <class T, class F>
T atomic(const char* name, T* address, const F& update, const Site& site) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    fault(site, name, ": the address is not a multiple of ", sizeof(T));
  }
  const T before = *address, after = update(before);
  *address = after;
  if (std::memcmp(&before, &after, sizeof(T)) == 0) {
    block->poll(name, site);
  } else {
    block->changed();
    if (schedule.seed != 0) block->preempt(name, site);
  }
  return before;
}

}  // namespace gossamer::emulation

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value,
            std::source_location site = std::source_location::current()) {
  static_assert(gossamer::emulation::kIsAtomicInteger<T> || std::is_floating_point_v<T>);
  const auto add = [value](T old) {
    if constexpr (std::is_integral_v<T>) {  // wraps, as the GPU does
      using U = std::make_unsigned_t<T>;
      return static_cast<T>(static_cast<U>(old) + static_cast<U>(value));
    } else {
      return old + value;
    }
  };
  return gossamer::emulation::atomic("atomicAdd", address, add, site);
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value,
            std::source_location site = std::source_location::current()) {
  static_assert(gossamer::emulation::kIsAtomicInteger<T>, "on floats: ptx::atomic_max");
  const auto larger = [value](T old) { return max(old, value); };
  return gossamer::emulation::atomic("atomicMax", address, larger, site);
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value,
            std::source_location site = std::source_location::current()) {
  static_assert(gossamer::emulation::kIsAtomicInteger<T>);
  const auto smaller = [value](T old) { return min(old, value); };
  return gossamer::emulation::atomic("atomicMin", address, smaller, site);
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value,
           std::source_location site = std::source_location::current()) {
  static_assert(gossamer::emulation::kIsAtomicInteger<T>);
  const auto any = [value](T old) { return old | value; };
  return gossamer::emulation::atomic("atomicOr", address, any, site);
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value,
            std::source_location site = std::source_location::current()) {
  static_assert(gossamer::emulation::kIsAtomicInteger<T>);
  const auto both = [value](T old) { return old & value; };
  return gossamer::emulation::atomic("atomicAnd", address, both, site);
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value,
             std::source_location site = std::source_location::current()) {
  static_assert(gossamer::emulation::kIsAtomicInteger<T>);
  const auto replace = [value](T) { return value; };
  return gossamer::emulation::atomic("atomicExch", address, replace, site);
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value,
            std::source_location site = std::source_location::current()) {
  static_assert(gossamer::emulation::kIsAtomicInteger<T>);
  const auto swap = [=](T old) { return old == expected ? value : old; };
  return gossamer::emulation::atomic("atomicCAS", address, swap, site);
}
