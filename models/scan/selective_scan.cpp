// Selective scan of Mamba-1 on the CPU, forward and backward. No tensor of size length x state is ever made.
//
// Vectors run over the state n (tiles are transposed to time-major when loaded), threads over independent pieces of work.
// Backward has three passes, none of which needs atomics or a barrier inside, so every number is summed in one fixed order
// whatever the number of threads:
//   1. adjoint_ends: per channel, the adjoint that enters each chunk from later chunks              (kept: one per chunk)
//   2. gradients:    per chunk, states again from the state kept before the chunk, then all gradients; dB and dC of a chunk are
//                    summed over the channels of a group in order; what is summed over time is written per chunk
//   3. totals:       those per-chunk parts, added in order
// Sequences may have any strides and be float, double, bfloat16 or half; arithmetic is in T (float or double).

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

extern "C" {
enum Type : int64_t { FLOAT, DOUBLE, BFLOAT16, HALF };

// A tensor: address (null: absent), type, strides in elements. Sequences (B, D, L); matrices (B, G, N, L), or with constant = 1 (D, N).
struct Array {
    char* data;
    int64_t type, constant, stride[4];
};

struct Scan {
    int64_t batch, channels, groups, length, state, chunk, chunks, softplus, threads, blocks;
    Array u, delta, A, B, C, D, z, bias;
    Array out, ends;  // ends (B, D, K, N) contiguous in T: the state after each chunk
    Array grad_out, grad_last;
    Array du, ddelta, dA, dB, dC, dD, dz, dbias;
    // scratch in T, contiguous: flow (B, D, K, N), sums (2, B, D, K), and if B or C is constant const_B, const_C (B, D, K, N);
    // if blocks > 1 block_B, block_C (blocks, B, G, N, L)
    Array flow, sums, const_B, const_C, block_B, block_C;
};
}

namespace {

// ---- vectors ---------------------------------------------------------------------------------------------------------------------

template <class T, int W> struct Vec { typedef T type __attribute__((vector_size(W * sizeof(T)))); };
template <class T> struct Bits;
template <> struct Bits<float> { typedef int32_t type; static constexpr int mantissa = 23, bias = 127; };
template <> struct Bits<double> { typedef int64_t type; static constexpr int mantissa = 52, bias = 1023; };

template <class T, int W> INLINE typename Vec<T, W>::type splat(T x) { return typename Vec<T, W>::type{} + x; }

// Sum of the lanes, by halves.
template <class T, int W> INLINE T lanes(typename Vec<T, W>::type v) {
    if constexpr (W == 1) {
        return v[0];
    } else {
        typename Vec<T, W / 2>::type half[2];
        memcpy(half, &v, sizeof v);
        if constexpr (W == 2) return half[0][0] + half[1][0];
        else return lanes<T, W / 2>(half[0] + half[1]);
    }
}

struct Ln2Powers {  // ln(2)^k / k!, the series of 2^r
    double c[15] = {};
    constexpr Ln2Powers() { c[0] = 1; for (int k = 1; k < 15; ++k) c[k] = c[k - 1] * 0.693147180559945309417 / k; }
};
constexpr Ln2Powers SERIES;

// 2^x to about one unit in the last place, 0 and infinity past the range, NaN for NaN.
template <class T, int W> INLINE typename Vec<T, W>::type exp2v(typename Vec<T, W>::type x) {
    typedef typename Vec<T, W>::type V;
    typedef typename Bits<T>::type I;
    typedef typename Vec<I, W>::type VI;
    constexpr int m = Bits<T>::mantissa, degree = sizeof(T) == 4 ? 7 : 13;
    constexpr T limit = sizeof(T) == 4 ? 160 : 1100, magic = T(3) * T(I(1) << (m - 1));
    x = x > limit ? splat<T, W>(limit) : x;
    x = x < -limit ? splat<T, W>(-limit) : x;
    V shifted = x + magic;  // its low bits are x rounded to an integer
    V r = x - (shifted - magic);
    V p = splat<T, W>(T(SERIES.c[degree]));
#pragma GCC unroll 16
    for (int k = degree - 1; k >= 0; --k) p = p * r + T(SERIES.c[k]);
    V base = splat<T, W>(magic);
    VI n = (VI)shifted - (VI)base, half = n >> 1;
    V s1 = (V)((half + Bits<T>::bias) << m), s2 = (V)((n - half + Bits<T>::bias) << m);
    return p * s1 * s2;
}

constexpr double LOG2E = 1.44269504088896340736;
template <class T> constexpr int TW = 16;  // lanes when a vector runs over time
template <class T> using TV = typename Vec<T, TW<T>>::type;
template <class T> INLINE TV<T> expv(TV<T> x) { return exp2v<T, TW<T>>(x * T(LOG2E)); }

// log(1 + e) for e in [0, 1], by 2 atanh(e / (2 + e)).
template <class T> INLINE TV<T> log1pv(TV<T> e) {
    constexpr int terms = sizeof(T) == 4 ? 8 : 17;
    TV<T> s = e / (e + T(2)), s2 = s * s, p = splat<T, TW<T>>(T(1) / T(2 * terms - 1));
#pragma GCC unroll 17
    for (int k = terms - 2; k >= 0; --k) p = p * s2 + T(1) / T(2 * k + 1);
    return T(2) * s * p;
}

// ---- memory ----------------------------------------------------------------------------------------------------------------------

INLINE float from_bf16(uint16_t h) { uint32_t b = uint32_t(h) << 16; float f; memcpy(&f, &b, 4); return f; }
INLINE uint16_t to_bf16(float f) {
    uint32_t b; memcpy(&b, &f, 4);
    return f != f ? 0x7fc0 : uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
INLINE float from_half(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023, b = e == 31 ? 0x7f800000u | m << 13 : (e + 112) << 23 | m << 13;
    float f; memcpy(&f, &b, 4);
    f = e ? f : float(m) * 5.9604644775390625e-8f;
    return sign ? -f : f;
}
INLINE uint16_t to_half(float f) {
    uint32_t b; memcpy(&b, &f, 4);
    uint16_t sign = (b >> 16) & 0x8000; b &= 0x7fffffff;
    if (b > 0x7f800000) return sign | 0x7e00;
    if (b >= 0x477ff000) return sign | 0x7c00;
    if (b < 0x38800000) {  // subnormal: count of 2^-24, rounded to even
        float a; memcpy(&a, &b, 4);
        return sign | uint16_t(__builtin_nearbyintf(a * 16777216.0f));
    }
    return sign | uint16_t((b - 0x38000000 + 0xfff + ((b >> 13) & 1)) >> 13);
}

template <class T, class F> INLINE void read_as(T* dst, int64_t step, const char* src, int64_t stride, int64_t count, F convert) {
    for (int64_t i = 0; i < count; ++i) dst[i * step] = convert(src, i * stride);
}
// dst[i * step] = src[at + i * stride], i < count
template <class T> void read(T* dst, int64_t step, const Array& x, int64_t at, int64_t stride, int64_t count) {
    if (x.type == FLOAT) {
        const char* p = x.data + at * 4;
        auto get = [](const char* s, int64_t i) { return T(((const float*)s)[i]); };
        if (stride == 1 && step == 1) read_as<T>(dst, 1, p, 1, count, get); else read_as<T>(dst, step, p, stride, count, get);
    } else if (x.type == DOUBLE) {
        read_as<T>(dst, step, x.data + at * 8, stride, count, [](const char* s, int64_t i) { return T(((const double*)s)[i]); });
    } else if (x.type == BFLOAT16) {
        read_as<T>(dst, step, x.data + at * 2, stride, count, [](const char* s, int64_t i) { return T(from_bf16(((const uint16_t*)s)[i])); });
    } else {
        read_as<T>(dst, step, x.data + at * 2, stride, count, [](const char* s, int64_t i) { return T(from_half(((const uint16_t*)s)[i])); });
    }
}
// dst[at + i * stride] = src[i * step], i < count
template <class T> void write(const Array& x, int64_t at, int64_t stride, const T* src, int64_t step, int64_t count) {
    if (x.type == FLOAT) for (int64_t i = 0; i < count; ++i) ((float*)x.data)[at + i * stride] = float(src[i * step]);
    else if (x.type == DOUBLE) for (int64_t i = 0; i < count; ++i) ((double*)x.data)[at + i * stride] = double(src[i * step]);
    else if (x.type == BFLOAT16) for (int64_t i = 0; i < count; ++i) ((uint16_t*)x.data)[at + i * stride] = to_bf16(float(src[i * step]));
    else for (int64_t i = 0; i < count; ++i) ((uint16_t*)x.data)[at + i * stride] = to_half(float(src[i * step]));
}

template <class T> struct Buffer {  // zeroed and aligned for every vector
    T* p;
    explicit Buffer(int64_t n) : p(new (std::align_val_t(128)) T[n]()) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { ::operator delete[](p, std::align_val_t(128)); }
    operator T*() { return p; }
};

struct FlushDenormals {  // a state that fades away must not slow the loop down a hundredfold
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#else
    FlushDenormals() {}
#endif
};

// ---- one kernel: arithmetic T, W lanes, VECTORS vectors per state (0: counted at run time) ------------------------------------------

constexpr int MOST = 32;  // vectors per state at run time

template <class T, int W, int VECTORS> struct Kernel {
    typedef typename Vec<T, W>::type V;
    static constexpr int CAP = VECTORS ? VECTORS : MOST;
    const Scan& s;
    const int counted;
    const int64_t per_group, rows;  // channels of a group; chunk rounded up to whole time vectors

    explicit Kernel(const Scan& s)
        : s(s), counted(int((s.state + W - 1) / W)), per_group(s.channels / s.groups), rows((s.chunk + 15) / 16 * 16) {}

    int nv() const { return VECTORS ? VECTORS : counted; }  // vectors of a state
    int pad() const { return nv() * W; }                    // its padded width

    INLINE V at(const T* p, int k) { return *(const V*)(p + k * W); }
    INLINE void put(T* p, int k, V v) { *(V*)(p + k * W) = v; }

    int64_t steps(int64_t k) const { return k + 1 < s.chunks ? s.chunk : s.length - k * s.chunk; }
    void sequence(T* dst, const Array& x, int64_t b, int64_t d, int64_t k, int64_t n) const {
        read(dst, 1, x, b * x.stride[0] + d * x.stride[1] + k * s.chunk * x.stride[2], x.stride[2], n);
    }
    void store(const Array& x, int64_t b, int64_t d, int64_t k, const T* src, int64_t n) const {
        write(x, b * x.stride[0] + d * x.stride[1] + k * s.chunk * x.stride[2], x.stride[2], src, 1, n);
    }
    // (N, steps) of a matrix to time-major rows of `pad`
    void tile(T* dst, const Array& x, int64_t b, int64_t g, int64_t k, int64_t n) const {
        const int64_t from = b * x.stride[0] + g * x.stride[1] + k * s.chunk * x.stride[3];
        if (x.stride[2] < x.stride[3]) for (int64_t t = 0; t < n; ++t) read(dst + t * pad(), 1, x, from + t * x.stride[3], x.stride[2], s.state);
        else for (int64_t i = 0; i < s.state; ++i) read(dst + i, pad(), x, from + i * x.stride[2], x.stride[3], n);
    }
    T* kept(const Array& x, int64_t b, int64_t d, int64_t k) const { return (T*)x.data + ((b * s.channels + d) * s.chunks + k) * s.state; }
    T value(const Array& x, int64_t d) const { T v = 0; if (x.data) read(&v, 1, x, d * x.stride[0], 1, 1); return v; }
    void row(T* dst, const Array& x, int64_t d) const { read(dst, 1, x, d * x.stride[0], x.stride[1], s.state); }

    // raw step sizes become step sizes; slope (optional) d step / d raw
    void step_sizes(T* delta, T* slope, T bias) const {
        for (int64_t i = 0; i < rows; i += TW<T>) {
            TV<T> x = *(TV<T>*)(delta + i) + bias, zero{}, one = splat<T, TW<T>>(1);
            if (s.softplus) {
                TV<T> e = expv<T>(x > 0 ? -x : x), soft = (x > 0 ? x : zero) + log1pv<T>(e);
                if (slope) *(TV<T>*)(slope + i) = x > T(20) ? one : (x > 0 ? one : e) / (one + e);
                x = x > T(20) ? x : soft;
            } else if (slope) {
                *(TV<T>*)(slope + i) = one;
            }
            *(TV<T>*)(delta + i) = x;
        }
    }
    // g becomes g z sigmoid(z); with y, z becomes the gradient g y (sigmoid(z) (1 + z (1 - sigmoid(z))))
    void gate(T* g, T* z, const T* y) const {
        for (int64_t i = 0; i < rows; i += TW<T>) {
            TV<T> x = *(TV<T>*)(z + i), grad = *(TV<T>*)(g + i), sigma = T(1) / (T(1) + expv<T>(-x));
            *(TV<T>*)(g + i) = grad * x * sigma;
            if (y) *(TV<T>*)(z + i) = grad * *(TV<T>*)(y + i) * sigma * (T(1) + x * (T(1) - sigma));
        }
    }
    void scaled_row(T* dst, int64_t d) const {  // A log2(e), for exp2
        row(dst, s.A, d);
        for (int i = 0; i < pad(); ++i) dst[i] = T(dst[i] * LOG2E);
    }

    // Channels of one (batch, group) in `parts` pieces: enough for all threads. The result of a channel does not depend on its piece.
    template <class F> void over_channels(F work) const {
        int64_t parts = (4 * s.threads + s.batch * s.groups - 1) / (s.batch * s.groups);
        if (s.threads == 1) parts = 1;
        if (parts > per_group) parts = per_group;
        const int64_t tasks = s.batch * s.groups * parts;
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; ++i) {
            FlushDenormals guard;
            const int64_t p = i % parts, bg = i / parts, g = bg % s.groups;
            work(bg / s.groups, g, g * per_group + p * per_group / parts, g * per_group + (p + 1) * per_group / parts);
        }
    }

    void forward() const { over_channels([this](int64_t b, int64_t g, int64_t d0, int64_t d1) { forward(b, g, d0, d1); }); }

    void forward(int64_t b, int64_t g, int64_t d0, int64_t d1) const {
        Buffer<T> Bt(rows * pad()), Ct(rows * pad()), state((d1 - d0) * pad()), A(pad()), delta(rows), u(rows), y(rows), z(rows);
        for (int64_t k = 0; k < s.chunks; ++k) {
            const int64_t n = steps(k);
            if (!s.B.constant) tile(Bt, s.B, b, g, k, n);
            if (!s.C.constant) tile(Ct, s.C, b, g, k, n);
            for (int64_t d = d0; d < d1; ++d) {
                if (s.B.constant) row(Bt, s.B, d);
                if (s.C.constant) row(Ct, s.C, d);
                scaled_row(A, d);
                sequence(delta, s.delta, b, d, k, n);
                sequence(u, s.u, b, d, k, n);
                step_sizes(delta, nullptr, value(s.bias, d));
                T* kept_state = state + (d - d0) * pad();
                V h[CAP];
                for (int j = 0; j < nv(); ++j) h[j] = at(kept_state, j);
                const int64_t bs = s.B.constant ? 0 : pad(), cs = s.C.constant ? 0 : pad();
                for (int64_t t = 0; t < n; ++t) {
                    V sum{};
                    const T dt = delta[t], x = delta[t] * u[t];
                    for (int j = 0; j < nv(); ++j) {
                        h[j] = exp2v<T, W>(at(A, j) * dt) * h[j] + at(Bt + t * bs, j) * x;
                        sum += at(Ct + t * cs, j) * h[j];
                    }
                    y[t] = lanes<T, W>(sum);
                }
                for (int j = 0; j < nv(); ++j) put(kept_state, j, h[j]);
                memcpy(kept(s.ends, b, d, k), kept_state, s.state * sizeof(T));
                const T skip = value(s.D, d);
                if (s.D.data) for (int64_t t = 0; t < n; ++t) y[t] += skip * u[t];
                if (s.z.data) { sequence(z, s.z, b, d, k, n); gate(y, z, nullptr); }
                store(s.out, b, d, k, y, n);
            }
        }
    }

    void adjoint_ends() const { over_channels([this](int64_t b, int64_t g, int64_t d0, int64_t d1) { adjoint_ends(b, g, d0, d1); }); }

    void adjoint_ends(int64_t b, int64_t g, int64_t d0, int64_t d1) const {
        Buffer<T> Ct(rows * pad()), flow((d1 - d0) * pad()), A(pad()), delta(rows), grad(rows), z(rows);
        if (s.grad_last.data)
            for (int64_t d = d0; d < d1; ++d)
                read(flow + (d - d0) * pad(), 1, s.grad_last, b * s.grad_last.stride[0] + d * s.grad_last.stride[1], s.grad_last.stride[2], s.state);
        for (int64_t k = s.chunks - 1; k >= 0; --k) {
            const int64_t n = steps(k);
            if (!s.C.constant && k) tile(Ct, s.C, b, g, k, n);
            for (int64_t d = d0; d < d1; ++d) {
                T* now = flow + (d - d0) * pad();
                memcpy(kept(s.flow, b, d, k), now, s.state * sizeof(T));
                if (!k) continue;
                if (s.C.constant) row(Ct, s.C, d);
                scaled_row(A, d);
                sequence(delta, s.delta, b, d, k, n);
                step_sizes(delta, nullptr, value(s.bias, d));
                sequence(grad, s.grad_out, b, d, k, n);
                if (s.z.data) { sequence(z, s.z, b, d, k, n); gate(grad, z, nullptr); }
                V r[CAP];
                for (int j = 0; j < nv(); ++j) r[j] = at(now, j);
                const int64_t cs = s.C.constant ? 0 : pad();
                for (int64_t t = n - 1; t >= 0; --t)
                    for (int j = 0; j < nv(); ++j) r[j] = exp2v<T, W>(at(A, j) * delta[t]) * (at(Ct + t * cs, j) * grad[t] + r[j]);
                for (int j = 0; j < nv(); ++j) put(now, j, r[j]);
            }
        }
    }

    struct Work {  // of one thread
        Buffer<T> B, C, dB, dC, a, h, A, scaled, u, delta, slope, grad, z, y, du, dd, part;
        Work(int64_t rows, int64_t pad)
            : B(rows * pad), C(rows * pad), dB(rows * pad), dC(rows * pad), a(rows * pad), h((rows + 1) * pad), A(pad), scaled(pad), u(rows),
              delta(rows), slope(rows), grad(rows), z(rows), y(rows), du(rows), dd(rows), part(pad) {}
    };

    void gradients() const {
        const int64_t tasks = s.batch * s.groups * s.chunks * s.blocks;
#pragma omp parallel num_threads(s.threads)
        {
            FlushDenormals guard;
            Work w(rows, pad());
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tasks; ++i) {
                const int64_t p = i % s.blocks, bgk = i / s.blocks, k = bgk % s.chunks, bg = bgk / s.chunks;
                gradients(w, bg / s.groups, bg % s.groups, k, p);
            }
        }
    }

    void gradients(Work& w, int64_t b, int64_t g, int64_t k, int64_t p) const {
        const int64_t n = steps(k), first = g * per_group + p * per_group / s.blocks, end = g * per_group + (p + 1) * per_group / s.blocks;
        if (!s.B.constant) tile(w.B, s.B, b, g, k, n);
        if (!s.C.constant) tile(w.C, s.C, b, g, k, n);
        memset(w.dB, 0, rows * pad() * sizeof(T));
        memset(w.dC, 0, rows * pad() * sizeof(T));
        for (int64_t d = first; d < end; ++d) channel(w, b, d, k, n);
        if (!s.B.constant) store_tile(s.dB, s.block_B, w.dB, b, g, k, p, n);
        if (!s.C.constant) store_tile(s.dC, s.block_C, w.dC, b, g, k, p, n);
    }

    void store_tile(const Array& whole, const Array& block, const T* src, int64_t b, int64_t g, int64_t k, int64_t p, int64_t n) const {
        for (int64_t i = 0; i < s.state; ++i) {
            if (s.blocks == 1) {
                write(whole, b * whole.stride[0] + g * whole.stride[1] + i * whole.stride[2] + k * s.chunk, 1, src + i, pad(), n);
            } else {
                const int64_t line = ((p * s.batch + b) * s.groups + g) * s.state + i;
                T* dst = (T*)block.data + line * s.length + k * s.chunk;
                for (int64_t t = 0; t < n; ++t) dst[t] = src[t * pad() + i];
            }
        }
    }

    void channel(Work& w, int64_t b, int64_t d, int64_t k, int64_t n) const {
        if (s.B.constant) row(w.B, s.B, d);
        if (s.C.constant) row(w.C, s.C, d);
        row(w.A, s.A, d);
        scaled_row(w.scaled, d);
        sequence(w.u, s.u, b, d, k, n);
        sequence(w.delta, s.delta, b, d, k, n);
        step_sizes(w.delta, w.slope, value(s.bias, d));
        sequence(w.grad, s.grad_out, b, d, k, n);
        const T skip = value(s.D, d);
        const bool gated = s.z.data;
        states(w, b, d, k, n, gated);
        if (gated) {
            sequence(w.z, s.z, b, d, k, n);
            for (int64_t t = 0; t < n; ++t) w.y[t] += skip * w.u[t];
            gate(w.grad, w.z, w.y);
            store(s.dz, b, d, k, w.z, n);
        }
        adjoint(w, b, d, k, n);
        T sum_skip = 0, sum_bias = 0;
        for (int64_t t = 0; t < n; ++t) {
            const T through_b = w.du[t];
            w.du[t] = skip * w.grad[t] + w.delta[t] * through_b;
            w.dd[t] = (w.dd[t] + w.u[t] * through_b) * w.slope[t];
            sum_skip += w.grad[t] * w.u[t];
            sum_bias += w.dd[t];
        }
        store(s.du, b, d, k, w.du, n);
        store(s.ddelta, b, d, k, w.dd, n);
        T* sums = (T*)s.sums.data + (b * s.channels + d) * s.chunks + k;
        sums[0] = sum_skip;
        sums[s.batch * s.channels * s.chunks] = sum_bias;
    }

    // a and h of every step of the chunk, h from the state before it; y if asked
    void states(Work& w, int64_t b, int64_t d, int64_t k, int64_t n, bool outputs) const {
        const int64_t bs = s.B.constant ? 0 : pad(), cs = s.C.constant ? 0 : pad();
        memset(w.h, 0, pad() * sizeof(T));
        if (k) memcpy(w.h, kept(s.ends, b, d, k - 1), s.state * sizeof(T));
        V h[CAP];
        for (int j = 0; j < nv(); ++j) h[j] = at(w.h, j);
        for (int64_t t = 0; t < n; ++t) {
            V sum{};
            const T dt = w.delta[t], x = w.delta[t] * w.u[t];
            for (int j = 0; j < nv(); ++j) {
                V a = exp2v<T, W>(at(w.scaled, j) * dt);
                h[j] = a * h[j] + at(w.B + t * bs, j) * x;
                put(w.a + t * pad(), j, a);
                put(w.h + (t + 1) * pad(), j, h[j]);
                sum += at(w.C + t * cs, j) * h[j];
            }
            if (outputs) w.y[t] = lanes<T, W>(sum);
        }
    }

    // lambda backwards in time: adds to dB and dC, leaves sum_n lambda B in w.du and sum_n lambda a h' A in w.dd, parts of dA in s.flow
    void adjoint(Work& w, int64_t b, int64_t d, int64_t k, int64_t n) const {
        const int64_t bs = s.B.constant ? 0 : pad(), cs = s.C.constant ? 0 : pad();
        memset(w.part, 0, pad() * sizeof(T));
        memcpy(w.part, kept(s.flow, b, d, k), s.state * sizeof(T));
        V r[CAP], dA[CAP];
        for (int j = 0; j < nv(); ++j) { r[j] = at(w.part, j); dA[j] = V{}; }
        for (int64_t t = n - 1; t >= 0; --t) {
            V through_b{}, through_a{};
            const T dt = w.delta[t], x = w.delta[t] * w.u[t], grad = w.grad[t];
            for (int j = 0; j < nv(); ++j) {
                V lam = at(w.C + t * cs, j) * grad + r[j];
                r[j] = at(w.a + t * pad(), j) * lam;
                V q = r[j] * at(w.h + t * pad(), j);
                put(w.dC + t * cs, j, at(w.dC + t * cs, j) + at(w.h + (t + 1) * pad(), j) * grad);
                put(w.dB + t * bs, j, at(w.dB + t * bs, j) + lam * x);
                dA[j] += q * dt;
                through_b += lam * at(w.B + t * bs, j);
                through_a += q * at(w.A, j);
            }
            w.du[t] = lanes<T, W>(through_b);
            w.dd[t] = lanes<T, W>(through_a);
        }
        for (int j = 0; j < nv(); ++j) put(w.part, j, dA[j]);
        memcpy(kept(s.flow, b, d, k), w.part, s.state * sizeof(T));
        constant_part(w.dB, s.B, s.const_B, b, d, k);
        constant_part(w.dC, s.C, s.const_C, b, d, k);
    }
    void constant_part(T* sum, const Array& matrix, const Array& parts, int64_t b, int64_t d, int64_t k) const {
        if (!matrix.constant) return;
        memcpy(kept(parts, b, d, k), sum, s.state * sizeof(T));
        memset(sum, 0, pad() * sizeof(T));
    }

    void totals() const {
#pragma omp parallel for num_threads(s.threads) schedule(static)
        for (int64_t d = 0; d < s.channels; ++d) {
            total(s.dA, s.flow, d);
            if (s.B.constant) total(s.dB, s.const_B, d);
            if (s.C.constant) total(s.dC, s.const_C, d);
            if (s.dD.data) write_sum(s.dD, 0, d);
            if (s.dbias.data) write_sum(s.dbias, 1, d);
        }
        if (s.blocks > 1) {
            if (!s.B.constant) add_blocks(s.dB, s.block_B);
            if (!s.C.constant) add_blocks(s.dC, s.block_C);
        }
    }
    void total(const Array& dst, const Array& parts, int64_t d) const {
        for (int64_t i = 0; i < s.state; ++i) {
            double sum = 0;
            for (int64_t b = 0; b < s.batch; ++b)
                for (int64_t k = 0; k < s.chunks; ++k) sum += kept(parts, b, d, k)[i];
            write(dst, d * dst.stride[0] + i * dst.stride[1], 1, &sum, 1, 1);
        }
    }
    void write_sum(const Array& dst, int64_t which, int64_t d) const {
        double sum = 0;
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t k = 0; k < s.chunks; ++k) sum += ((T*)s.sums.data)[((which * s.batch + b) * s.channels + d) * s.chunks + k];
        write(dst, d * dst.stride[0], 1, &sum, 1, 1);
    }
    void add_blocks(const Array& dst, const Array& parts) const {
        const int64_t lines = s.batch * s.groups * s.state;
#pragma omp parallel for num_threads(s.threads) schedule(static)
        for (int64_t line = 0; line < lines; ++line) {
            T* sum = (T*)parts.data + line * s.length;
            for (int64_t p = 1; p < s.blocks; ++p)
                for (int64_t t = 0; t < s.length; ++t) sum[t] += sum[p * lines * s.length + t];
            write(dst, line * s.length, 1, sum, 1, s.length);
        }
    }

    void backward() const { adjoint_ends(); gradients(); totals(); }
};

template <class F> int dispatch(const Scan& s, F run) {
    const bool wide = s.ends.type == DOUBLE;
    if (s.state > MOST * 16) return 1;
    if (wide) run(Kernel<double, 16, 0>(s));
    else if (s.state <= 4) run(Kernel<float, 4, 1>(s));
    else if (s.state <= 8) run(Kernel<float, 8, 1>(s));
    else if (s.state <= 16) run(Kernel<float, 16, 1>(s));
    else run(Kernel<float, 16, 0>(s));
    return 0;
}

}  // namespace

extern "C" int64_t segfleet_scan_size() { return sizeof(Scan); }
extern "C" int64_t segfleet_scan_forward(const Scan* s) { return dispatch(*s, [](auto k) { k.forward(); }); }
extern "C" int64_t segfleet_scan_backward(const Scan* s) { return dispatch(*s, [](auto k) { k.backward(); }); }
