// What surrounds the matmuls of a decode step on a CPU: RMS norm, rotary embedding, writing into KV slots.
//
// As single torch operators these are some 30 calls a layer on a few kilobytes each; here each is one. Results are
// rounded to the tensors' dtype wherever transformers' own code rounds, sums are taken in fp32.
// Does not cover attention, GPUs, or a rotary embedding of a part of the head.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <tuple>

namespace {

using at::Tensor;

#define DISPATCH(type, name, ...)                                            \
  AT_DISPATCH_SWITCH(type, name, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)   \
                                     AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) \
                                     AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

// c10's own conversion branches on NaN, which keeps the loops below from being vectorized. This one gives the same
// for every number, and a NaN for every NaN that arithmetic makes (their payload is not all ones).
inline at::BFloat16 narrow(float value, at::BFloat16) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return at::BFloat16(static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16), at::BFloat16::from_bits());
}
inline at::Half narrow(float value, at::Half) { return static_cast<at::Half>(value); }
inline float narrow(float value, float) { return value; }

template <class T>
inline T to(float value) {
  return narrow(value, T());
}
template <class T>
inline float rounded(float value) {
  return static_cast<float>(to<T>(value));
}

template <class T>
void norm_row(T* out, const T* x, const T* weight, int64_t size, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(x[i]);
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i)
    out[i] = to<T>(static_cast<float>(weight[i]) * rounded<T>(static_cast<float>(x[i]) * scale));
}

template <class T>
void rotate_head(T* out, const T* x, const T* cos, const T* sin, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float low = static_cast<float>(x[i]), high = static_cast<float>(x[i + half]);
    out[i] = to<T>(rounded<T>(low * static_cast<float>(cos[i])) - rounded<T>(high * static_cast<float>(sin[i])));
    out[i + half] = to<T>(rounded<T>(high * static_cast<float>(cos[i + half])) +
                          rounded<T>(low * static_cast<float>(sin[i + half])));
  }
}

// input [..., H], weight [H] -> [..., H]: weight * round(x / rms(x)), as LlamaRMSNorm.
Tensor rms_norm(const Tensor& input, const Tensor& weight, double eps) {
  const int64_t width = input.size(-1);
  TORCH_CHECK(weight.is_contiguous() && weight.numel() == width && weight.scalar_type() == input.scalar_type());
  const Tensor x = input.contiguous();
  Tensor out = at::empty_like(x);
  DISPATCH(x.scalar_type(), "rms_norm", [&] {
    for (int64_t at = 0; at < x.numel(); at += width)
      norm_row(out.mutable_data_ptr<scalar_t>() + at, x.const_data_ptr<scalar_t>() + at,
               weight.const_data_ptr<scalar_t>(), width, static_cast<float>(eps));
  });
  return out;
}

// x [B, heads, T, D], cos and sin [1 or B, T, D] -> [B, heads, T, D] whose memory is [B, T, heads, D].
Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t batch = x.size(0), heads = x.size(1), length = x.size(2), dim = x.size(3);
  TORCH_CHECK(x.stride(3) == 1 && dim % 2 == 0 && cos.is_contiguous() && sin.is_contiguous());
  TORCH_CHECK(cos.sizes() == sin.sizes() && cos.dim() == 3 && cos.size(1) == length && cos.size(2) == dim);
  TORCH_CHECK(cos.size(0) == 1 || cos.size(0) == batch);
  TORCH_CHECK(cos.scalar_type() == x.scalar_type() && sin.scalar_type() == x.scalar_type());
  Tensor out = at::empty({batch, length, heads, dim}, x.options());
  DISPATCH(x.scalar_type(), "rotary", [&] {
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < length; ++t) {
        const int64_t angle = ((cos.size(0) == 1 ? 0 : b) * length + t) * dim;
        const scalar_t* from = x.const_data_ptr<scalar_t>() + b * x.stride(0) + t * x.stride(2);
        for (int64_t h = 0; h < heads; ++h, target += dim)
          rotate_head(target, from + h * x.stride(1), cos.const_data_ptr<scalar_t>() + angle,
                      sin.const_data_ptr<scalar_t>() + angle, dim / 2);
      }
  });
  return out.transpose(1, 2);
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  return {rotate(q, cos, sin), rotate(k, cos, sin)};
}

// Copies the first tokens of x [B, heads, T, D] (B * T in order) to cells [n] of slots [..., heads, D].
void store_one(const Tensor& slots, const Tensor& x, const Tensor& cells) {
  const int64_t heads = x.size(1), length = x.size(2), dim = x.size(3), count = cells.numel();
  const int64_t capacity = slots.numel() / (heads * dim);
  TORCH_CHECK(slots.is_contiguous() && slots.scalar_type() == x.scalar_type() && slots.size(-1) == dim);
  TORCH_CHECK(slots.size(-2) == heads && x.stride(3) == 1 && count <= x.size(0) * length);
  TORCH_CHECK(cells.is_contiguous() && cells.scalar_type() == at::kLong);
  const int64_t item = x.element_size(), bytes = dim * item;
  char* base = static_cast<char*>(slots.mutable_data_ptr());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t cell = cells.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(cell >= 0 && cell < capacity, "no such cell");
    const char* token = from + (i / length * x.stride(0) + i % length * x.stride(2)) * item;
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(base + (cell * heads + h) * bytes, token + h * x.stride(1) * item, bytes);
  }
}

void store(const Tensor& keys, const Tensor& values, const Tensor& k, const Tensor& v, const Tensor& cells) {
  store_one(keys, k, cells);
  store_one(values, v, cells);
}

}  // namespace

TORCH_LIBRARY(dsserve_cpu, m) {
  m.def("rms_norm(Tensor input, Tensor weight, float eps) -> Tensor", &rms_norm);
  m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", &rotary);
  m.def("store(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor cells) -> ()", &store);
}
