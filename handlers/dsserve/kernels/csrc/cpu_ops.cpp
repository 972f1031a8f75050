// What surrounds the matmuls of a decode step on a CPU: RMS norm, rotary embedding, writing into the KV cache, and
// attention of single tokens over its pages.
//
// As single torch operators these are some 30 calls a layer on a few kilobytes each; here each is one. Results are
// rounded to the tensors' dtype wherever transformers' own code rounds, sums are taken in fp32.
// Does not cover attention of prompts, GPUs, or a rotary embedding of a part of the head.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

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

// Copies the first tokens of x [B, heads, T, D] (B * T in order) to cells [n] of slots [cells, heads, D].
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

// Where the tokens of one row lie, and what of them one KV head sees.
template <class T>
struct Pages {
  const T* keys;    // of token 0 of cell 0, this KV head
  const T* values;
  const int32_t* table;
  int64_t page_tokens, key_cell, value_cell;  // elements from one cell to the next

  int64_t cell(int64_t token) const { return table[token / page_tokens] * page_tokens + token % page_tokens; }
};

// scores[g * length + t] = q[g] . k[t], scaled; then their softmax, unnormalized. Returns nothing but fills sums[g].
template <class T>
void weigh(float* scores, float* sums, const float* q, const Pages<T>& pages, int64_t group, int64_t length,
           int64_t dim) {
  for (int64_t t = 0; t < length; ++t) {
    const T* key = pages.keys + pages.cell(t) * pages.key_cell;
    for (int64_t g = 0; g < group; ++g) {
      const float* own = q + g * dim;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < dim; ++i) sum += own[i] * static_cast<float>(key[i]);
      scores[g * length + t] = sum;
    }
  }
  for (int64_t g = 0; g < group; ++g) {
    float* row = scores + g * length;
    const float best = *std::max_element(row, row + length);
    float sum = 0;
    for (int64_t t = 0; t < length; ++t) sum += row[t] = std::exp(row[t] - best);
    sums[g] = sum;
  }
}

// One row, one KV head: the outputs of the query heads that share it.
template <class T>
void attend_group(T* out, const T* query, int64_t query_head, const Pages<T>& pages, int64_t group, int64_t length,
                  int64_t dim, int64_t value_dim, float scale, std::vector<float>& memory) {
  memory.assign(group * (dim + length + value_dim + 1), 0.0f);
  float *q = memory.data(), *scores = q + group * dim, *sums = scores + group * length, *total = sums + group;
  for (int64_t g = 0; g < group; ++g)
    for (int64_t i = 0; i < dim; ++i) q[g * dim + i] = static_cast<float>(query[g * query_head + i]) * scale;
  weigh(scores, sums, q, pages, group, length, dim);
  for (int64_t t = 0; t < length; ++t) {
    const T* value = pages.values + pages.cell(t) * pages.value_cell;
    for (int64_t g = 0; g < group; ++g) {
      const float weight = scores[g * length + t];
      float* own = total + g * value_dim;
#pragma omp simd
      for (int64_t i = 0; i < value_dim; ++i) own[i] += weight * static_cast<float>(value[i]);
    }
  }
  for (int64_t g = 0; g < group; ++g)
    for (int64_t i = 0; i < value_dim; ++i) out[g * value_dim + i] = to<T>(total[g * value_dim + i] / sums[g]);
}

// query [n, H, D], keys [cells, KV, D], values [cells, KV, V], table [rows, pages] int32, rows and lengths [n] int64:
// attention of n tokens, each over the first `length` tokens of its row -> [n, H, V].
Tensor paged_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& table,
                       const Tensor& rows, const Tensor& lengths, int64_t page_tokens, double scale) {
  const int64_t count = query.size(0), heads = query.size(1), dim = query.size(2), kv_heads = keys.size(1);
  const int64_t value_dim = values.size(2), group = kv_heads ? heads / kv_heads : 0, pages = table.size(1);
  TORCH_CHECK(query.stride(2) == 1 && keys.is_contiguous() && values.is_contiguous() && table.is_contiguous());
  TORCH_CHECK(keys.scalar_type() == query.scalar_type() && values.scalar_type() == query.scalar_type());
  TORCH_CHECK(keys.size(2) == dim && values.size(1) == kv_heads && group * kv_heads == heads);
  TORCH_CHECK(table.scalar_type() == at::kInt && rows.scalar_type() == at::kLong && lengths.scalar_type() == at::kLong);
  TORCH_CHECK(rows.is_contiguous() && lengths.is_contiguous() && rows.numel() == count && lengths.numel() == count);
  const int64_t *row = rows.const_data_ptr<int64_t>(), *length = lengths.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < count; ++n)
    TORCH_CHECK(row[n] >= 0 && row[n] < table.size(0) && length[n] > 0 && length[n] <= pages * page_tokens);
  Tensor out = at::empty({count, heads, value_dim}, query.options());
  DISPATCH(query.scalar_type(), "paged_attention", [&] {
    const scalar_t *q = query.const_data_ptr<scalar_t>(), *k = keys.const_data_ptr<scalar_t>();
    const scalar_t* v = values.const_data_ptr<scalar_t>();
    scalar_t* result = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, count * kv_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> memory;
      for (int64_t at = begin; at < end; ++at) {
        const int64_t n = at / kv_heads, head = at % kv_heads;
        const Pages<scalar_t> own{k + head * dim, v + head * value_dim,
                                  table.const_data_ptr<int32_t>() + row[n] * pages, page_tokens, kv_heads * dim,
                                  kv_heads * value_dim};
        attend_group(result + (n * heads + head * group) * value_dim,
                     q + n * query.stride(0) + head * group * query.stride(1), query.stride(1), own, group, length[n],
                     dim, value_dim, static_cast<float>(scale), memory);
      }
    });
  });
  return out;
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
  m.def(
      "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor table, Tensor rows, Tensor lengths, "
      "int page_tokens, float scale) -> Tensor",
      &paged_attention);
}
