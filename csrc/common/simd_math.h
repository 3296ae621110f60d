#pragma once
// Elementary functions over the vector vocabulary, to a few units in the last place of float32.

namespace gossamer {

// e^x = 2^n * e^r with |r| <= ln(2)/2; Taylor's polynomial of degree 7 leaves 5e-9 there. 2^n is
// applied in two halves, so that results overflow to infinity and fade through the subnormals.
template <class S>
typename S::F exp(typename S::F x) {
  using F = typename S::F;
  using I = typename S::I;
  x = S::max(S::set1(-104.0f), S::min(S::set1(89.0f), x));  // NaN passes both
  const I n = S::round(S::mul(x, S::set1(1.44269504f)));
  F r = S::fma(S::to_float(n), S::set1(-0.693359375f), x);  // ln 2 in two parts: n * first is exact
  r = S::fma(S::to_float(n), S::set1(2.12194440e-4f), r);
  F p = S::set1(1.0f / 5040);
  constexpr float kRest[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float c : kRest) p = S::fma(p, r, S::set1(c));
  const I first = S::half(n), second = S::sub(n, first), bias = S::set1(127u);
  p = S::mul(p, S::as_float(S::template shift_left<23>(S::add(first, bias))));
  return S::mul(p, S::as_float(S::template shift_left<23>(S::add(second, bias))));
}

// x * sigmoid(x)
template <class S>
typename S::F silu(typename S::F x) {
  return S::div(x, S::add(S::set1(1.0f), exp<S>(S::negate(x))));
}

// x * Phi(x) with Phi(x) = 1 - h for x >= 0 and h for x < 0, h = erfc(|x| / sqrt 2) / 2
//   = e^(-x^2/2) * t * P(t) / 2, t = 1 / (1 + z/2), z = |x| / sqrt 2.
// P is a least-squares fit on z in [0, 9.3], relative error 4e-8 before rounding.
template <class S>
typename S::F gelu(typename S::F x) {
  using F = typename S::F;
  const F z = S::mul(S::abs(x), S::set1(0.70710678f));
  const F t = S::div(S::set1(1.0f), S::fma(z, S::set1(0.5f), S::set1(1.0f)));
  F p = S::set1(-0.0588016026f);
  constexpr float kRest[] = {0.283264041f, -0.484470099f, 0.274923891f, -0.0244440921f,
                             0.201755777f, 0.243341491f,  0.282342225f, 0.282088339f};
  for (float c : kRest) p = S::fma(p, t, S::set1(c));
  const F gaussian = exp<S>(S::negate(S::mul(z, z)));
  const F h = S::mul(S::mul(S::mul(gaussian, S::set1(0.5f)), t), p);
  return S::mul(x, S::where_negative(x, h, S::sub(S::set1(1.0f), h)));
}

}  // namespace gossamer
