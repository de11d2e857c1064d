// A box of voxels out of a shard: chunks are read, checked, decoded and put in place as float32, in
// one call for all of them.
//
// Decoding itself is left to the blosc and Zstandard libraries that numcodecs brings (their functions
// are handed in), so this file knows of blosc's format only the header: bytes 4 to 16 are the decoded
// size, the size of a block and the packed size, little-endian.

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

#if defined(__SSE4_2__)
#include <nmmintrin.h>
#endif

namespace {

constexpr uint64_t MISSING = ~0ull;       // offset of a chunk of zeros: it is left out
constexpr uint64_t AT_ONCE = 4ull << 20;  // bytes of neighbouring chunks that are read together
constexpr int64_t HEADER = 16;

// CRC-32C (Castagnoli, reflected 0x82f63b78) of a run of zeros, as a table: a checksum moved over
// N bytes, so that three parts of a block can be summed side by side.
struct Crc {
  static constexpr int64_t PART = 1024;
  uint32_t table[8][256], far[4][256];
  Crc() {
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t c = b;
      for (int k = 0; k < 8; ++k) c = (c >> 1) ^ ((c & 1) ? 0x82f63b78u : 0);
      table[0][b] = c;
    }
    for (uint32_t b = 0; b < 256; ++b)
      for (int k = 1; k < 8; ++k)
        table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 255];
    for (int k = 0; k < 4; ++k)
      for (uint32_t b = 0; b < 256; ++b) {
        uint32_t c = b << (8 * k);
        for (int64_t i = 0; i < PART; ++i) c = (c >> 8) ^ table[0][c & 255];
        far[k][b] = c;
      }
  }
  uint32_t moved(uint32_t c) const {
    return far[0][c & 255] ^ far[1][(c >> 8) & 255] ^ far[2][(c >> 16) & 255] ^ far[3][c >> 24];
  }
  uint32_t word(uint32_t c, const uint8_t* p) const {
#if defined(__SSE4_2__)
    uint64_t v;
    std::memcpy(&v, p, 8);
    return (uint32_t)_mm_crc32_u64(c, v);
#else
    c ^= p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24;
    return table[7][c & 255] ^ table[6][(c >> 8) & 255] ^ table[5][(c >> 16) & 255] ^ table[4][c >> 24] ^
           table[3][p[4]] ^ table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
#endif
  }
  uint32_t of(const uint8_t* p, int64_t n) const {
    uint32_t c = ~0u;
    for (; n >= 3 * PART; n -= 3 * PART, p += 3 * PART) {
      uint32_t second = 0, third = 0;
      for (int64_t i = 0; i < PART; i += 8) {
        c = word(c, p + i), second = word(second, p + PART + i), third = word(third, p + 2 * PART + i);
      }
      c = moved(moved(c) ^ second) ^ third;
    }
    for (; n >= 8; n -= 8, p += 8) c = word(c, p);
    for (; n > 0; --n, ++p) c = (c >> 8) ^ table[0][(c ^ *p) & 255];
    return ~c;
  }
};

const Crc& crc() {
  static const Crc made;
  return made;
}

uint32_t little(const uint8_t* p) { return p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24; }

// float16 -> float32, exactly, of finite values: the bits in place, the other bias by a product.
inline float widen(uint16_t half) {
  const int32_t bits = (int32_t)((uint32_t)(int32_t)(int16_t)half << 13) & (int32_t)0x8fffffff;
  float value;
  std::memcpy(&value, &bits, 4);
  return value * 5192296858534827628530496329220096.0f;
}

enum Kind : int64_t { HALF, BYTE, SHORT, FLOAT, LABEL, TWO };  // TWO: two bytes as they are stored
constexpr int64_t WIDTH[] = {2, 1, 2, 4, 1, 2};                // bytes of a stored voxel
constexpr int64_t WIDE[] = {4, 4, 4, 4, 1, 2};                 // and of one that is put in place

void put(const uint8_t* from, int64_t n, int64_t kind, float scale, void* to) {
  float* out = (float*)to;
  if (kind == HALF) {
    const uint16_t* in = (const uint16_t*)from;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = widen(in[i]);
  } else if (kind == BYTE) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = (float)from[i] * scale;
  } else if (kind == SHORT) {
    const int16_t* in = (const int16_t*)from;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = (float)in[i] * scale;
  } else {
    std::memcpy(to, from, n * WIDTH[kind]);
  }
}

int64_t read_all(int file, uint8_t* to, uint64_t count, uint64_t offset) {
  while (count) {
    const ssize_t got = pread(file, to, count, (off_t)offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -errno;
    if (got == 0) return 1;  // the file ends here
    to += got, offset += got, count -= got;
  }
  return 0;
}

using Whole = int (*)(const void*, void*, size_t, int);  // blosc_decompress_ctx
using Items = int (*)(const void*, int, int, void*);     // blosc_getitem

using Frame = size_t (*)(void*, void*, size_t, const void*, size_t);  // ZSTD_decompressDCtx
using Context = void* (*)();                                          // ZSTD_createDCtx

// A whole chunk that is one frame.
bool decode(Frame frame, Context context, const uint8_t* packed, int64_t count, int64_t size,
            uint8_t* piece) {
  static thread_local void* own = context();  // for as long as the thread
  return own && frame(own, piece, size, packed, count) == (size_t)size;
}

// A chunk's slices [low, high) of every channel into `piece`, where they lie in the whole chunk.
bool decode(Whole whole, Items items, const uint8_t* packed, int64_t count, const int64_t* chunk,
            int64_t width, int64_t low, int64_t high, uint8_t* piece) {
  const int64_t plane = chunk[2] * chunk[3], channel = chunk[1] * plane, size = chunk[0] * channel * width;
  if (count < HEADER || little(packed + 4) != size || little(packed + 12) != count) return false;
  const int64_t block = little(packed + 8);
  const bool some = high - low < chunk[1] && block < size && block <= channel * width;
  if (!some || packed[3] != width) return whole(packed, piece, size, 1) == size;
  for (int64_t c = 0; c < chunk[0]; ++c) {
    const int64_t first = c * channel + low * plane, n = (high - low) * plane;
    if (items(packed, (int)first, (int)n, piece + first * width) != n * width) return false;
  }
  return true;
}

}  // namespace

extern "C" {

uint32_t segfleet_crc32c(const uint8_t* data, int64_t n) { return crc().of(data, n); }

// index: (chunks along z, y, x; 2) offset and bytes of every chunk; sums: their CRC-32C, or null where
// a chunk ends in its own; bare: chunks are Zstandard frames, `whole` and `part` Frame and Context, else
// Whole and Items; grid: chunks along z, y, x; chunk: channels, z, y, x; start, size: the box
// (z, y, x), inside the array; out: float32, or one or two bytes as stored, `strides` (in voxels) from channel to
// channel, slice to slice, row to row. 0, 1 + the number of a damaged chunk, or -errno.
int64_t segfleet_unpack(int bare, const void* whole, const void* part, int file, const uint64_t* index, const uint32_t* sums,
                        const int64_t* grid, const int64_t* chunk, const int64_t* start,
                        const int64_t* size, int64_t kind, float scale, uint8_t* out,
                        const int64_t* strides) {
  static thread_local std::vector<uint8_t> packed, piece;
  const int64_t width = WIDTH[kind], wide = WIDE[kind];
  const int64_t plane = chunk[2] * chunk[3], channel = chunk[1] * plane;
  piece.resize(chunk[0] * channel * width + 64);
  int64_t first[3], last[3];
  for (int a = 0; a < 3; ++a) first[a] = start[a] / chunk[a + 1], last[a] = (start[a] + size[a] - 1) / chunk[a + 1];
  const auto number = [&](int64_t i, int64_t j, int64_t k) { return (i * grid[1] + j) * grid[2] + k; };
#if defined(POSIX_FADV_WILLNEED)
  // all chunks are fetched at once: twice as fast from a cold disk
  if (number(last[0], last[1], last[2]) > number(first[0], first[1], first[2]))
    for (int64_t i = first[0]; i <= last[0]; ++i)
      for (int64_t j = first[1]; j <= last[1]; ++j) {
        uint64_t low = MISSING, high = 0;
        for (int64_t k = first[2]; k <= last[2]; ++k) {
          const uint64_t* entry = index + 2 * number(i, j, k);
          if (entry[0] != MISSING) low = std::min(low, entry[0]), high = std::max(high, entry[0] + entry[1]);
        }
        if (high) posix_fadvise(file, (off_t)low, (off_t)(high - low), POSIX_FADV_WILLNEED);
      }
#endif
  for (int64_t i = first[0]; i <= last[0]; ++i)
    for (int64_t j = first[1]; j <= last[1]; ++j) {
      int64_t held = first[2];  // chunks before this one are in `packed`, which begins at `origin`
      uint64_t origin = 0;
      for (int64_t k = first[2]; k <= last[2]; ++k) {
        const int64_t at[3] = {i, j, k};
        int64_t low[3], n[3], to = 0;
        for (int a = 0; a < 3; ++a) {
          const int64_t begin = at[a] * chunk[a + 1];
          const int64_t from = std::max(start[a], begin), stop = std::min(start[a] + size[a], begin + chunk[a + 1]);
          low[a] = from - begin, n[a] = stop - from;
          to += (from - start[a]) * (a == 2 ? 1 : strides[a + 1]);
        }
        const uint64_t* entry = index + 2 * number(i, j, k);
        if (entry[0] == MISSING) {
          for (int64_t c = 0; c < chunk[0]; ++c)
            for (int64_t z = 0; z < n[0]; ++z)
              for (int64_t y = 0; y < n[1]; ++y)
                std::memset(out + (to + c * strides[0] + z * strides[1] + y * strides[2]) * wide, 0, n[2] * wide);
          held = std::max(held, k + 1);
          continue;
        }
        if (k >= held) {
          origin = entry[0];
          uint64_t stop = entry[0] + entry[1];
          for (held = k + 1; held <= last[2]; ++held) {
            const uint64_t* next = index + 2 * number(i, j, held);
            if (next[0] != stop || stop + next[1] - origin > AT_ONCE) break;
            stop += next[1];
          }
          if (stop - origin > (1ull << 31)) return 1 + number(i, j, k);
          if (packed.size() < stop - origin + 64) packed.resize(stop - origin + 64);
          if (const int64_t failed = read_all(file, packed.data(), stop - origin, origin))
            return failed < 0 ? failed : 1 + number(i, j, k);
        }
        const uint8_t* its = packed.data() + (entry[0] - origin);
        const int64_t count = (int64_t)entry[1] - (sums ? 0 : 4);
        if (count < 1 || crc().of(its, count) != (sums ? sums[number(i, j, k)] : little(its + count)) ||
            !(bare ? decode((Frame)whole, (Context)part, its, count, chunk[0] * channel * width, piece.data())
                   : decode((Whole)whole, (Items)part, its, count, chunk, width, low[0], low[0] + n[0],
                            piece.data())))
          return 1 + number(i, j, k);
        for (int64_t c = 0; c < chunk[0]; ++c)
          for (int64_t z = 0; z < n[0]; ++z)
            for (int64_t y = 0; y < n[1]; ++y) {
              const int64_t from = c * channel + (low[0] + z) * plane + (low[1] + y) * chunk[3] + low[2];
              put(piece.data() + from * width, n[2], kind, scale,
                  out + (to + c * strides[0] + z * strides[1] + y * strides[2]) * wide);
            }
      }
    }
  return 0;
}
}
