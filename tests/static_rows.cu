// CUDA kernels for the static report: one that keeps the rule, and four findings.
// static: rows<4> dtype=float32 streamed=2048 threads=128 shared=1024
// static: rows<1> dtype=float32 streamed=2048 threads=128
// static: lost dtype=float32 threads=32
// static: absent dtype=float32 threads=32
template <int kWidth>
__global__ void rows(const float* x, float* out, int n) {
  __shared__ float sums[128];
  float sum = 0;
  if constexpr (kWidth == 4) {
    for (int i = threadIdx.x; i < n; i += 128) {
      float4 v = reinterpret_cast<const float4*>(x)[i];
      sum += v.x + v.y + v.z + v.w;
    }
  } else {
    for (int i = threadIdx.x; i < n; i += 128) sum += x[i];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  out[threadIdx.x] = sums[threadIdx.x ^ 1];
}
template __global__ void rows<4>(const float*, float*, int);
template __global__ void rows<1>(const float*, float*, int);
__global__ void lost(const int* at, float* out) {
  float kept[64];
  for (int i = 0; i < 64; i++) kept[i] = out[i];
  for (int i = 0; i < 64; i++) kept[at[i] & 63] += 1.0f;
  out[threadIdx.x] = kept[at[threadIdx.x] & 63];
}
__global__ void untold(float* out) { out[threadIdx.x] = 1; }
