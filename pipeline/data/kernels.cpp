// What augmentation does to every voxel.
//
// Every operation is an IEEE operation in a fixed order, compiled without contraction into fused
// multiply-adds, so any processor gives the same bits, and so do numpy and torch in geometry.py and
// intensity.py, which stand in where there is no compiler.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// Cell and fraction of a position: the cell has its upper corner inside the box.
inline void locate(float at, int64_t size, int32_t& cell, float& part) {
  const float last = (float)(size - 1);
  at = at < 0.0f ? 0.0f : at;
  at = at > last ? last : at;
  const int32_t most = size > 1 ? (int32_t)(size - 2) : 0;
  cell = (int32_t)at;
  cell = cell > most ? most : cell;
  part = at - (float)cell;
}

inline float mix(float a, float b, float t) { return a + t * (b - a); }

// 2^(power * log2(u)) of u in [0, 1], to some 1e-6.
inline float power_of(float u, float power) {
  int32_t bits;
  __builtin_memcpy(&bits, &u, 4);
  int32_t e = (bits >> 23) - 127;
  bits = (bits & 0x7fffff) | 0x3f800000;
  float m;
  __builtin_memcpy(&m, &bits, 4);
  const bool large = m > 1.41421356f;
  m = large ? m * 0.5f : m;
  e = large ? e + 1 : e;
  const float s = (m - 1.0f) / (m + 1.0f), t = s * s;
  const float series = 1.0f + t * (0.33333334f + t * (0.2f + t * (0.14285715f + t * 0.11111111f)));
  float y = power * ((float)e + (2.8853901f * s) * series);
  y = y < -126.0f ? -126.0f : y;
  const float whole = __builtin_floorf(y + 0.5f);
  const float r = (y - whole) * 0.6931472f;
  const float raised =
      1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * (0.008333334f + r * 0.0013888889f)))));
  bits = ((int32_t)whole + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, 4);
  return u > 0.0f ? raised * scale : 0.0f;
}

// One output line of a blur: line[r] times the middle weight, then pairs from the outside in.
inline void blend(const float* const* line, const float* weight, int64_t radius, int64_t n, float* out) {
  const float* middle = line[radius];
  for (int64_t x = 0; x < n; ++x) out[x] = middle[x] * weight[radius];
  for (int64_t k = 0; k < radius; ++k) {
    const float *a = line[k], *b = line[2 * radius - k];
    const float w = weight[k];
#pragma GCC ivdep
    for (int64_t x = 0; x < n; ++x) out[x] = out[x] + (a[x] + b[x]) * w;
  }
}

constexpr int64_t LANES = 16;

uint8_t vote(const uint8_t* corner, float fz, float fy, float fx) {
  const float z[2] = {1.0f - fz, fz}, y[2] = {1.0f - fy, fy}, x[2] = {1.0f - fx, fx};
  float weight[8];
  for (int k = 0; k < 8; ++k) weight[k] = (z[k >> 2] * y[(k >> 1) & 1]) * x[k & 1];
  float best = -1.0f;
  uint8_t chosen = 0;
  const uint8_t one = corner[0];
  uint8_t other = one;
  for (int k = 1; k < 8; ++k) other = corner[k] != one ? corner[k] : other;
  float ones = 0.0f, others = 0.0f;
  bool two = true;  // nearly always: the same sums, in one pass
  for (int k = 0; k < 8; ++k) {
    ones = ones + (corner[k] == one ? weight[k] : 0.0f);
    others = others + (corner[k] == other ? weight[k] : 0.0f);
    two &= corner[k] == one || corner[k] == other;
  }
  if (two) return others > ones || (others == ones && other < one) ? other : one;
  for (int i = 0; i < 8; ++i) {
    bool counted = false;
    for (int k = 0; k < i; ++k) counted |= corner[k] == corner[i];
    if (counted) continue;
    float sum = 0.0f;
    for (int k = 0; k < 8; ++k) sum = sum + (corner[k] == corner[i] ? weight[k] : 0.0f);
    if (sum > best || (sum == best && corner[i] < chosen)) best = sum, chosen = corner[i];
  }
  return chosen;
}

// Two neighbours along x at each cell, side by side: loads one by one, faster than gathers.
constexpr int64_t BLOCK = 16;
inline void pairs(const float* in, const int32_t* cell, float* out) {
  for (int64_t k = 0; k < BLOCK; ++k) __builtin_memcpy(out + 2 * k, in + cell[k], 8);
}

template <bool FLAT>
void image_row(const float* in, const int32_t* cell, const float* fz, const float* fy, const float* fx,
               int64_t n, int64_t sz, int64_t sy, int64_t sx, float* out) {
  const float *a = in, *b = in + sx, *c = in + sy, *d = in + sy + sx;
  const float *e = a + sz, *f = b + sz, *g = c + sz, *h = d + sz;
  int64_t x = 0;
  for (; sx && x + BLOCK <= n; x += BLOCK) {
    float ab[2 * BLOCK], cd[2 * BLOCK], ef[2 * BLOCK], gh[2 * BLOCK];
    pairs(a, cell + x, ab), pairs(c, cell + x, cd);
    if (!FLAT) pairs(e, cell + x, ef), pairs(g, cell + x, gh);
    for (int64_t k = 0; k < BLOCK; ++k) {
      const float t = fx[x + k];
      float low = mix(mix(ab[2 * k], ab[2 * k + 1], t), mix(cd[2 * k], cd[2 * k + 1], t), fy[x + k]);
      if (!FLAT) {
        const float high = mix(mix(ef[2 * k], ef[2 * k + 1], t), mix(gh[2 * k], gh[2 * k + 1], t), fy[x + k]);
        low = mix(low, high, fz[x + k]);
      }
      out[x + k] = low;
    }
  }
  for (; x < n; ++x) {
    const int32_t i = cell[x];
    float low = mix(mix(a[i], b[i], fx[x]), mix(c[i], d[i], fx[x]), fy[x]);
    if (!FLAT) {
      const float high = mix(mix(e[i], f[i], fx[x]), mix(g[i], h[i], fx[x]), fy[x]);
      low = mix(low, high, fz[x]);
    }
    out[x] = low;
  }
}

// The label of every cell whose corners agree, MIXED elsewhere.
constexpr uint16_t MIXED = 256;
void settle(const uint8_t* label, const int64_t* box, int64_t sz, int64_t sy, int64_t sx, uint16_t* out) {
  const int64_t wide = box[2] - (sx ? 1 : 0);
  for (int64_t z = 0; z < box[0] - (sz ? 1 : 0); ++z)
    for (int64_t y = 0; y < box[1] - (sy ? 1 : 0); ++y) {
      const uint8_t *a = label + (z * box[1] + y) * box[2], *b = a + sy, *c = a + sz, *d = a + sz + sy;
      uint16_t* row = out + (a - label);
#pragma GCC ivdep
      for (int64_t x = 0; x < wide; ++x) {
        const uint8_t differ = (uint8_t)((a[x] ^ b[x]) | (a[x] ^ c[x]) | (a[x] ^ d[x]) | (a[x] ^ a[x + sx]) |
                                         (a[x] ^ b[x + sx]) | (a[x] ^ c[x + sx]) | (a[x] ^ d[x + sx]));
        row[x] = differ ? MIXED : (uint16_t)a[x];
      }
    }
}

// numpy's stream of normal numbers, float32: Philox 4x64 (Salmon et al. 2011, ten rounds) feeds a
// ziggurat of 256 layers (Marsaglia and Tsang 2000; its constants of Doornik 2005).
class Normals {
 public:
  explicit Normals(uint64_t key) : key_(key) {}

  // x[i] + normal * sigma
  void add(float* x, int64_t n, float sigma) {
    const Layers& layer = layers();
    int64_t i = 0;
    while (i < n) {
      if (next_ + GROUP > WORDS || i + GROUP > n) {
        x[i] = x[i] + one(layer) * sigma;
        ++i;
        continue;
      }
      // nearly always all of a group lie in the body of their layers
      const uint32_t* r = words_ + next_;
      float normal[GROUP];
      int64_t good = 0;
      for (; good < GROUP; ++good) {
        const uint32_t at = r[good] & 255, size = r[good] >> 9;
        normal[good] = signed_by(r[good], (float)(int32_t)size * layer.width[at]);
        if (size >= layer.inner[at]) break;
      }
      next_ += good;
      if (good < GROUP) {
        for (int64_t k = 0; k < good; ++k) x[i + k] = x[i + k] + normal[k] * sigma;
        i += good;
        x[i] = x[i] + one(layer) * sigma;
        ++i;
        continue;
      }
      for (int64_t k = 0; k < GROUP; ++k) x[i + k] = x[i + k] + normal[k] * sigma;
      i += GROUP;
    }
  }

 private:
  static constexpr int64_t WORDS = 2048, GROUP = 16;
  static constexpr double EDGE = 3.6541528853610088, AREA = 0.00492867323399141;

  struct Layers {
    uint32_t inner[256];
    float width[256], height[256];
    Layers() {
      const double whole = 8388608.0;  // 2^23
      const auto density = [](double x) { return std::exp(-0.5 * x * x); };
      double x = EDGE;
      inner[0] = (uint32_t)(x * density(x) / AREA * whole + 0.5);
      width[0] = (float)(AREA / density(x) / whole);
      width[255] = (float)(x / whole);
      height[0] = 1.0f;
      height[255] = (float)density(x);
      for (int i = 254; i >= 1; --i) {
        const double smaller = std::sqrt(-2.0 * std::log(AREA / x + density(x)));
        inner[i + 1] = (uint32_t)(smaller / x * whole + 0.5);
        width[i] = (float)(smaller / whole);
        height[i] = (float)density(smaller);
        x = smaller;
      }
      inner[1] = 0;
    }
  };
  static const Layers& layers() {
    static const Layers made;
    return made;
  }

  float one(const Layers& layer) {
    const float edge = (float)EDGE, inverse = (float)(1 / EDGE);
    for (;;) {
      const uint32_t r = word(), at = r & 255, size = r >> 9;
      const float x = signed_by(r, (float)(int32_t)size * layer.width[at]);
      if (size < layer.inner[at]) return x;
      if (at == 0) {
        for (;;) {
          const float a = -inverse * log1pf(-unit()), b = -log1pf(-unit());
          if (b + b > a * a) return ((size >> 8) & 1) ? -(edge + a) : edge + a;
        }
      }
      if ((layer.height[at - 1] - layer.height[at]) * unit() + layer.height[at] < std::exp(-0.5 * x * x))
        return x;
    }
  }

  // minus x if the word's ninth bit is set; without a branch, which would be guessed wrong half the time
  static float signed_by(uint32_t word, float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    bits ^= (word & 256) << 23;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }

  float unit() { return (float)(int32_t)(word() >> 8) * (1.0f / 16777216.0f); }

  uint32_t word() {
    if (next_ == WORDS) more();
    return words_[next_++];
  }

  void more() {
    uint64_t made[4];
    for (int64_t block = 0; block < WORDS; block += 8) {
      uint64_t a = ++counter_, b = 0, c = 0, d = 0, first = key_, second = 0;
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
        const unsigned __int128 p = (unsigned __int128)0xD2E7470EE14C6C93ull * a;
        const unsigned __int128 q = (unsigned __int128)0xCA5A826395121157ull * c;
        a = (uint64_t)(q >> 64) ^ b ^ first, b = (uint64_t)q;
        c = (uint64_t)(p >> 64) ^ d ^ second, d = (uint64_t)p;
        first += 0x9E3779B97F4A7C15ull, second += 0xBB67AE8584CAA73Bull;
      }
      made[0] = a, made[1] = b, made[2] = c, made[3] = d;
      for (int k = 0; k < 4; ++k) {
        words_[block + 2 * k] = (uint32_t)made[k];
        words_[block + 2 * k + 1] = (uint32_t)(made[k] >> 32);
      }
    }
    next_ = 0;
  }

  uint64_t key_, counter_ = 0;
  int64_t next_ = WORDS;
  uint32_t words_[WORDS];
};

}  // namespace

extern "C" {

// In place: x + sigma * normal, the numbers numpy's Generator(Philox(key)) draws.
void segfleet_noise(float* x, int64_t n, float sigma, uint64_t key) { Normals(key).add(x, n, sigma); }

// image: (channels, box) float32; label: (box) uint8; lines: nine rows, of source axis a along patch
// axis b at 3 a + b; shifts: (3, patch) float32 or null; out as the inputs, of the patch's size.
void segfleet_resample(const float* image, const uint8_t* label, int64_t channels, const int64_t* box,
                       const int64_t* patch, const float* const* lines, const float* shifts, float* out,
                       uint8_t* out_label) {
  // One pass: where each voxel comes from, the image there (linear) and the label there (the one with
  // the largest weight among the eight corners of the cell, of equals the smaller).
  const int64_t n = patch[2], voxels = box[0] * box[1] * box[2];
  const int64_t sz = box[0] > 1 ? box[1] * box[2] : 0, sy = box[1] > 1 ? box[2] : 0, sx = box[2] > 1;
  std::vector<int32_t> cells(n), zs(n), ys(n), xs(n);
  std::vector<float> fz(n), fy(n), fx(n);
  static thread_local std::vector<uint16_t> settled;
  if ((int64_t)settled.size() < voxels) settled.resize(voxels);
  settle(label, box, sz, sy, sx, settled.data());
  int32_t* where[3] = {zs.data(), ys.data(), xs.data()};
  float* part[3] = {fz.data(), fy.data(), fx.data()};
  for (int64_t z = 0; z < patch[0]; ++z)
    for (int64_t y = 0; y < patch[1]; ++y) {
      const int64_t row = (z * patch[1] + y) * n;
      for (int a = 0; a < 3; ++a) {
        const float start = lines[3 * a][z] + lines[3 * a + 1][y];
        const float* along = lines[3 * a + 2];
        const float* shift = shifts ? shifts + a * patch[0] * patch[1] * n + row : nullptr;
        int32_t* w = where[a];
        float* p = part[a];
        const int64_t size = box[a];
        if (shift) {
#pragma GCC ivdep
          for (int64_t x = 0; x < n; ++x) locate((start + along[x]) + shift[x], size, w[x], p[x]);
        } else {
#pragma GCC ivdep
          for (int64_t x = 0; x < n; ++x) locate(start + along[x], size, w[x], p[x]);
        }
      }
      const int32_t wide = (int32_t)box[2], high = (int32_t)box[1];
#pragma GCC ivdep
      for (int64_t x = 0; x < n; ++x) cells[x] = (zs[x] * high + ys[x]) * wide + xs[x];
      for (int64_t c = 0; c < channels; ++c)
        (sz ? image_row<false> : image_row<true>)(image + c * voxels, cells.data(), fz.data(), fy.data(),
                                                  fx.data(), n, sz, sy, sx,
                                                  out + c * patch[0] * patch[1] * n + row);
      for (int64_t x = 0; x < n; ++x) {
        const uint16_t found = settled[cells[x]];
        if (found < MIXED) {
          out_label[row + x] = (uint8_t)found;
          continue;
        }
        const uint8_t* l = label + cells[x];
        const uint8_t corner[8] = {l[0],  l[sx],      l[sy],      l[sy + sx],
                                   l[sz], l[sz + sx], l[sz + sy], l[sz + sy + sx]};
        out_label[row + x] = vote(corner, fz[x], fy[x], fx[x]);
      }
    }
}

// Smallest, largest, sum and sum of squares; sums in float64, LANES of them side by side.
void segfleet_moments(const float* in, int64_t n, double* out) {
  double sum[LANES] = {}, square[LANES] = {};
  float low[LANES], high[LANES];
  for (int64_t k = 0; k < LANES; ++k) low[k] = high[k] = in[0];
  const int64_t even = n / LANES * LANES;
  for (int64_t i = 0; i < even; i += LANES)
    for (int64_t k = 0; k < LANES; ++k) {
      const float v = in[i + k];
      const double d = (double)v;
      sum[k] += d, square[k] += d * d;
      low[k] = v < low[k] ? v : low[k], high[k] = v > high[k] ? v : high[k];
    }
  for (int64_t i = even; i < n; ++i) {
    const double d = (double)in[i];
    sum[i - even] += d, square[i - even] += d * d;
    low[0] = std::min(low[0], in[i]), high[0] = std::max(high[0], in[i]);
  }
  out[0] = *std::min_element(low, low + LANES), out[1] = *std::max_element(high, high + LANES);
  out[2] = out[3] = 0;
  for (int64_t k = 0; k < LANES; ++k) out[2] += sum[k], out[3] += square[k];
}

// In place: (x - subtract) * factor + add, within [low, high].
void segfleet_affine(float* x, int64_t n, float subtract, float factor, float add, float low, float high) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float v = (x[i] - subtract) * factor + add;
    v = v < low ? low : v;
    x[i] = v > high ? high : v;
  }
}

// In place: ((x - low) / span) ** power * range + low.
void segfleet_power(float* x, int64_t n, float low, float span, float range, float power) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) x[i] = power_of((x[i] - low) / span, power) * range + low;
}

// In place, (z, y, x): along one axis; the border is repeated.
void segfleet_blur(float* x, const int64_t* size, int64_t axis, const float* weight, int64_t radius) {
  const int64_t n = size[axis];
  int64_t before = 1, after = 1;
  for (int64_t a = 0; a < axis; ++a) before *= size[a];
  for (int64_t a = axis + 1; a < 3; ++a) after *= size[a];
  std::vector<const float*> line(2 * radius + 1);
  if (after == 1) {
    std::vector<float> padded(n + 2 * radius);
    for (int64_t b = 0; b < before; ++b) {
      float* row = x + b * n;
      for (int64_t i = 0; i < n + 2 * radius; ++i)
        padded[i] = row[std::min(std::max(i - radius, (int64_t)0), n - 1)];
      for (int64_t k = 0; k <= 2 * radius; ++k) line[k] = padded.data() + k;
      blend(line.data(), weight, radius, n, row);
    }
    return;
  }
  const int64_t wide = std::min(after, (int64_t)256);  // a strip of lines that stays in the cache
  std::vector<float> strip((n + 2 * radius) * wide);
  for (int64_t b = 0; b < before; ++b)
    for (int64_t left = 0; left < after; left += wide) {
      const int64_t w = std::min(wide, after - left);
      float* base = x + b * n * after + left;
      for (int64_t i = 0; i < n + 2 * radius; ++i) {
        const float* from = base + std::min(std::max(i - radius, (int64_t)0), n - 1) * after;
        std::copy(from, from + w, strip.data() + i * wide);
      }
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = 0; k <= 2 * radius; ++k) line[k] = strip.data() + (i + k) * wide;
        blend(line.data(), weight, radius, w, base + i * after);
      }
    }
}
}
