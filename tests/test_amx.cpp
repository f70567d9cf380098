// The kernels for AMX on processors that have AVX-512 but no tiles: here the tile instructions are plain loops, with the errors that a
// processor raises, and the suite of §9 runs over the kernels that use them. Under AddressSanitizer it sees what a tile reads too much.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

namespace amx_emu {

struct Tile {
    std::uint8_t data[16][64];
    int rows, bytes;
};
inline thread_local Tile tiles[8];

inline void demand(bool good, const char* what) {
    if (!good) throw std::logic_error(what);
}
template <class T>
T& at(Tile& tile, int row, int column) {
    return reinterpret_cast<T*>(tile.data[row])[column];
}

inline void configure(const void* shapes) {
    std::uint8_t bytes[64];
    std::memcpy(bytes, shapes, 64);
    demand(bytes[0] == 1 && bytes[1] == 0, "palette 1, from row 0");
    for (int i = 0; i < 8; ++i) {
        tiles[i] = {{}, bytes[48 + i], bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8};
        demand(tiles[i].rows <= 16 && tiles[i].bytes <= 64, "at most 16 rows of 64 bytes");
    }
}
inline void release() { std::memset(tiles, 0, sizeof tiles); }
inline void zero(int tile) { std::memset(tiles[tile].data, 0, sizeof tiles[tile].data); }
inline void load(int tile, const void* from, std::size_t stride) {
    demand(tiles[tile].rows > 0, "a tile that has a shape");
    zero(tile);
    for (int r = 0; r < tiles[tile].rows; ++r)
        std::memcpy(tiles[tile].data[r], static_cast<const char*>(from) + static_cast<std::size_t>(r) * stride, static_cast<std::size_t>(tiles[tile].bytes));
}
inline void save(int tile, void* to, std::size_t stride) {
    demand(tiles[tile].rows > 0, "a tile that has a shape");
    for (int r = 0; r < tiles[tile].rows; ++r)
        std::memcpy(static_cast<char*>(to) + static_cast<std::size_t>(r) * stride, tiles[tile].data[r], static_cast<std::size_t>(tiles[tile].bytes));
}

// c += a b, groups of four bytes of a's row m times those of b's column n; add(sum, row of a, column of b).
template <class T, class Add>
void multiply(int c, int a, int b, Add add) {
    demand(c != a && c != b && a != b, "three tiles");
    demand(tiles[c].rows == tiles[a].rows && tiles[c].bytes == tiles[b].bytes && tiles[a].bytes == 4 * tiles[b].rows && tiles[c].rows > 0, "shapes that fit");
    for (int m = 0; m < tiles[c].rows; ++m)
        for (int n = 0; n < tiles[c].bytes / 4; ++n) {
            std::uint32_t rows[16], columns[16];
            for (int k = 0; k < tiles[b].rows; ++k) rows[k] = at<std::uint32_t>(tiles[a], m, k), columns[k] = at<std::uint32_t>(tiles[b], k, n);
            T& sum = at<T>(tiles[c], m, n);
            sum = add(sum, rows, columns, tiles[b].rows);
        }
}
inline void dot_bytes(int c, int a, int b) {
    multiply<std::int32_t>(c, a, b, [](std::int32_t sum, const std::uint32_t* row, const std::uint32_t* column, int n) {
        for (int k = 0; k < n; ++k)
            for (int i = 0; i < 32; i += 8) sum += static_cast<std::int8_t>(row[k] >> i) * static_cast<std::int8_t>(column[k] >> i);
        return sum;
    });
}
inline void dot_pairs(int c, int a, int b) {  // the sums of even and odd columns, then of both
    multiply<float>(c, a, b, [](float sum, const std::uint32_t* row, const std::uint32_t* column, int n) {
        float even = 0, odd = 0;
        for (int k = 0; k < n; ++k) {
            even = std::fma(std::bit_cast<float>(row[k] << 16), std::bit_cast<float>(column[k] << 16), even);
            odd = std::fma(std::bit_cast<float>(row[k] & 0xffff0000u), std::bit_cast<float>(column[k] & 0xffff0000u), odd);
        }
        return sum + (even + odd);
    });
}

}  // namespace amx_emu

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) amx_emu::configure(shapes)
#define _tile_release() amx_emu::release()
#define _tile_loadd(tile, from, stride) amx_emu::load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx_emu::save(tile, to, stride)
#define _tile_zero(tile) amx_emu::zero(tile)
#define _tile_dpbssd(c, a, b) amx_emu::dot_bytes(c, a, b)
#define _tile_dpbf16ps(c, a, b) amx_emu::dot_pairs(c, a, b)
#endif

#define LLAMA3_IMPLEMENTATION
#include "llama3.hpp"

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

namespace {

using namespace llama3;
namespace d = llama3::detail;

std::vector<const d::Kernels*> kernels_here() {
    for (const d::KernelChoice& choice : d::all_kernels())
        if (choice.kernels->name == std::string("amx") && d::cpu_features().avx512_vnni) return {choice.kernels};
    return {&d::baseline::kernels};
}

TEST_CASE("the kernels for AMX are there wherever AVX-512 is") {
    if (!d::cpu_features().avx512_vnni) MESSAGE("did not run: the processor has no AVX-512 with VNNI, which the kernels for AMX need besides tiles");
    else CHECK(kernels_here()[0]->name == std::string("amx"));
}

}  // namespace

#define LLAMA3_TESTED_KERNELS
#include "test_09_kernels.inl"
