// Vectors of floats, as wide as the instruction set this library is compiled for.
//
// GCC's vector extensions give +, -, *, / and comparisons on every instruction set; this file adds what they lack:
// loads and stores with conversion, fused multiply-add, maxima, the exponential. Contraction is off (-ffp-contract=off):
// a product is fused with a sum where the code says fma, and nowhere else, so rounding points can be read in the source.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE2 or NEON
#endif

using f32v = float __attribute__((vector_size(4 * LANES)));
using i32v = int32_t __attribute__((vector_size(4 * LANES)));
using u32v = uint32_t __attribute__((vector_size(4 * LANES)));
using u16v = uint16_t __attribute__((vector_size(2 * LANES)));

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

inline f32v splat(float x) { return f32v{} + x; }

inline u32v splat(uint32_t x) { return u32v{} + x; }

inline f32v fma(f32v a, f32v b, f32v c) {  // a * b + c, rounded once (twice where the machine cannot)
#if defined(__AVX512F__)
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline f32v max(f32v a, f32v b) {
#if defined(__AVX512F__)
    return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline float max_of(f32v v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < LANES; ++i) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

// The lanes' sum, halves first: ((0 + 8) + (4 + 12)) ... Always in this order.
inline float sum_of(f32v v) {
    float lanes[LANES];
    std::memcpy(lanes, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

inline i32v lane_numbers() {
    i32v numbers;
    for (int i = 0; i < LANES; ++i) numbers[i] = i;
    return numbers;
}

// ---- conversion ---------------------------------------------------------------------------------------------------

// Round to nearest even bfloat16; the result sits in the upper 16 bits of each lane. NaN stays NaN.
inline u32v round_bf16(f32v x) {
    u32v bits = bit_cast<u32v>(x);
    u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return x == x ? rounded : (bits | 0x00400000u) & 0xffff0000u;
}

inline float half_to_float(uint16_t half) {
    uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    float value = bit_cast<float>(magnitude << 13) * 0x1p112f;  // exact, also for subnormals
    return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

inline uint16_t float_to_half(float value) {
    uint32_t bits = bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {                         // subnormal: let the adder round
        float shifted = bit_cast<float>(magnitude) + 0.5f;
        return sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u);
    }
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);
    return sign | ((magnitude - 0x38000000u) >> 13);
}

// ---- loads and stores ---------------------------------------------------------------------------------------------

inline f32v load(const float* from) {
    f32v v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline u32v load(const uint32_t* from) {
    u32v v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline f32v load(const bf16* from) {
    u16v half;
    std::memcpy(&half, from, sizeof half);
#if defined(__AVX512F__)
    u32v wide = (u32v)_mm512_cvtepu16_epi32((__m256i)half);
#elif defined(__AVX2__)
    u32v wide = (u32v)_mm256_cvtepu16_epi32((__m128i)half);
#else
    u32v wide = __builtin_convertvector(half, u32v);
#endif
    return bit_cast<f32v>(wide << 16);
}

inline f32v load(const fp16* from) {
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    f32v v;
    for (int i = 0; i < LANES; ++i) v[i] = half_to_float(from[i].bits);
    return v;
#endif
}

// Lane i holds low[i] in its lower half and high[i] in its upper half.
inline u32v interleave(const bf16* low, const bf16* high) {
#if defined(__AVX512BW__)
    __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)low));
    both = _mm512_inserti64x4(both, _mm256_loadu_si256((const __m256i*)high), 1);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (u32v)_mm512_permutexvar_epi16(order, both);
#else
    return bit_cast<u32v>(load(low)) >> 16 | bit_cast<u32v>(load(high));
#endif
}

inline void store(float* to, f32v v) { std::memcpy(to, &v, sizeof v); }

inline void store(uint32_t* to, u32v v) { std::memcpy(to, &v, sizeof v); }

inline void store(bf16* to, f32v v) {
#if defined(__AVX512F__)
    u16v half = (u16v)_mm512_cvtepi32_epi16((__m512i)(round_bf16(v) >> 16));
#else
    u16v half = __builtin_convertvector(round_bf16(v) >> 16, u16v);
#endif
    std::memcpy(to, &half, sizeof half);
}

// As store, for numbers of which subnormal ones may become zero.
inline void store_normal(float* to, f32v v) { store(to, v); }
inline void store_normal(bf16* to, f32v v) {
#if defined(__AVX512BF16__)
    const u16v half = bit_cast<u16v>(_mm512_cvtneps_pbh((__m512)v));
    std::memcpy(to, &half, sizeof half);
#else
    store(to, v);
#endif
}

inline void store(fp16* to, f32v v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < LANES; ++i) to[i].bits = float_to_half(v[i]);
#endif
}

// The first ``count`` < LANES elements; the other lanes are zero.
template <class T>
inline f32v load_some(const T* from, int count) {
    T padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <class T>
inline void store_some(T* to, f32v v, int count) {
    T padded[LANES];
    store(padded, v);
    std::memcpy(to, padded, count * sizeof(T));
}

// What remains of ``v`` once it has been stored as T.
inline f32v round_to(const float*, f32v v) { return v; }
inline f32v round_to(const bf16*, f32v v) { return bit_cast<f32v>(round_bf16(v)); }
inline f32v round_to(const fp16*, f32v v) {
    fp16 half[LANES];
    store(half, v);
    return load(half);
}
template <class T>
inline f32v rounded(f32v v) {
    return round_to(static_cast<const T*>(nullptr), v);
}

// ---- exponential --------------------------------------------------------------------------------------------------

// 2^n * (1 + r + ...) for the integer nearest to x; |r| <= ln(2) / 2, relative error below 2e-7. ``r`` is what is left
// of the argument in units of e. Adding 1.5 * 2^23 rounds to an integer, which then is in the low bits.
inline f32v scaled_exp(f32v shifted, f32v r) {
    f32v p = splat(1.9875691500e-4f);  // minimax polynomial of the Cephes library's expf
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    u32v exponent = bit_cast<u32v>(shifted) << 23;
    return bit_cast<f32v>(bit_cast<u32v>(p) + exponent);
}

constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23

// e^x. Zero below -87.3 (no subnormals), infinite above 88.7; NaN stays NaN.
inline f32v exp(f32v x) {
    f32v shifted = fma(x, splat(1.44269504f), splat(ROUNDING));
    f32v n = shifted - ROUNDING;
    f32v r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32v e = scaled_exp(shifted, r);
    e = x < -87.3f ? f32v{} : e;
    return x > 88.7f ? splat(INFINITY) : e;
}

// 2^x for x <= 0: exactly 1 at 0, exactly 0 below -126 and at -infinity.
inline f32v exp2_of_negative(f32v x) {
    f32v shifted = x + ROUNDING;
    f32v r = (x - (shifted - ROUNDING)) * 0.69314718f;
    f32v e = scaled_exp(shifted, r);
    return x < -126.0f ? f32v{} : e;
}
