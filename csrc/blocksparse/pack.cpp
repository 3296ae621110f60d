// Between the dense weight and its blocks, and what makes indices valid.
#include <algorithm>

#include "blocksparse/blocksparse.h"
#include "common/check.h"
#include "common/parallel.h"

namespace gossamer::blocksparse {
namespace {

// Where a block lies in the dense [C_out, taps, group_in], without its padding.
struct Place {
  int64_t offset;      // of its first element
  int64_t rows, cols;  // that are not padding
};

Place place_of(const Weight& w, int64_t block_row, int64_t block_column) {
  const int64_t row = block_row % w.row_blocks() * w.rows;
  const int64_t channel = block_column % w.col_blocks() * w.cols;
  const int64_t first_row = block_row / w.row_blocks() * w.group_out + row;
  const int64_t tap = block_column / w.col_blocks();
  return {(first_row * w.taps + tap) * w.group_in + channel, std::min(w.rows, w.group_out - row),
          std::min(w.cols, w.group_in - channel)};
}

int64_t row_stride(const Weight& w) { return w.taps * w.group_in; }

// Calls body(T{}) with an unsigned integer of the dtype's size: everything here moves bits.
template <class Body>
void visit_bits(DType dtype, const Body& body) {
  switch (size_of(dtype)) {
    case 8: return body(uint64_t{});
    case 4: return body(uint32_t{});
    case 2: return body(uint16_t{});
    default: return;  // refused at the border
  }
}

// Neither 0.0 nor -0.0: something is left without the sign.
template <class T>
bool is_nonzero(T bits) {
  return static_cast<T>(bits << 1) != 0;
}

// Calls body(block, place) for every live block of the block rows [begin, end).
template <class Body>
void for_each_block(const Weight& w, int64_t begin, int64_t end, const Body& body) {
  for (int64_t block_row = begin; block_row < end; ++block_row) {
    for (int64_t b = w.crow_indices[block_row]; b < w.crow_indices[block_row + 1]; ++b) {
      body(b, place_of(w, block_row, w.col_indices[b]));
    }
  }
}

int team_for(const Weight& w, int threads) {
  return threads_for_bytes(threads, w.groups * w.group_out * row_stride(w) * size_of(w.dtype));
}

}  // namespace

void find_live(const void* dense, const Weight& w, uint8_t* live, int threads) {
  visit_bits(w.dtype, [&]<class T>(T) {
    parallel_ranges(team_for(w, threads), w.block_rows(), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * w.block_columns(); at < end * w.block_columns(); ++at) {
        const Place place = place_of(w, at / w.block_columns(), at % w.block_columns());
        const T* row = static_cast<const T*>(dense) + place.offset;
        live[at] = 0;
        for (int64_t r = 0; r < place.rows && !live[at]; ++r, row += row_stride(w)) {
          live[at] = std::any_of(row, row + place.cols, is_nonzero<T>);
        }
      }
    });
  });
}

void gather(const void* dense, const Weight& w, void* values, int threads) {
  visit_bits(w.dtype, [&]<class T>(T) {
    parallel_ranges(team_for(w, threads), w.block_rows(), [&](int64_t begin, int64_t end) {
      for_each_block(w, begin, end, [&](int64_t block, const Place& place) {
        T* to = static_cast<T*>(values) + block * w.rows * w.cols;
        const T* row = static_cast<const T*>(dense) + place.offset;
        std::fill_n(to, w.rows * w.cols, T{});
        for (int64_t r = 0; r < place.rows; ++r, row += row_stride(w), to += w.cols) {
          std::copy_n(row, place.cols, to);
        }
      });
    });
  });
}

void to_dense(const Weight& w, void* dense, int threads) {
  visit_bits(w.dtype, [&]<class T>(T) {
    parallel_ranges(team_for(w, threads), w.block_rows(), [&](int64_t begin, int64_t end) {
      for (int64_t block_row = begin; block_row < end; ++block_row) {
        const Place rows = place_of(w, block_row, 0);
        std::fill_n(static_cast<T*>(dense) + rows.offset, rows.rows * row_stride(w), T{});
      }
      for_each_block(w, begin, end, [&](int64_t block, const Place& place) {
        const T* from = static_cast<const T*>(w.values) + block * w.rows * w.cols;
        T* row = static_cast<T*>(dense) + place.offset;
        for (int64_t r = 0; r < place.rows; ++r, row += row_stride(w), from += w.cols) {
          std::copy_n(from, place.cols, row);
        }
      });
    });
  });
}

void check_indices(const Weight& w) {
  const int32_t* crow = w.crow_indices;
  GOSSAMER_CHECK(crow[0] == 0, "BlockSparse: crow_indices begin with ", crow[0], ", expected 0");
  // Whole first: no block is looked up before the ends of all rows are known to lie within nnz.
  for (int64_t row = 0; row < w.block_rows(); ++row) {
    GOSSAMER_CHECK(crow[row + 1] >= crow[row], "BlockSparse: crow_indices decrease from ",
                   crow[row], " to ", crow[row + 1], " at block row ", row);
  }
  GOSSAMER_CHECK(crow[w.block_rows()] == w.nnz, "BlockSparse: crow_indices end with ",
                 crow[w.block_rows()], ", there are ", w.nnz, " blocks");
  for (int64_t row = 0; row < w.block_rows(); ++row) {
    int64_t last = -1;
    for (int64_t block = crow[row]; block < crow[row + 1]; last = w.col_indices[block++]) {
      const int64_t column = w.col_indices[block];
      GOSSAMER_CHECK(column >= 0 && column < w.block_columns(), "BlockSparse: column ", column,
                     " of block ", block, " in block row ", row, " is outside of [0, ",
                     w.block_columns(), ")");
      GOSSAMER_CHECK(column > last, "BlockSparse: column ", column, " of block ", block,
                     " follows ", last, " in block row ", row, ", columns must increase");
    }
  }
}

void check_padding(const Weight& w) {
  visit_bits(w.dtype, [&]<class T>(T) {
    for_each_block(w, 0, w.block_rows(), [&](int64_t block, const Place& place) {
      const T* values = static_cast<const T*>(w.values) + block * w.rows * w.cols;
      for (int64_t at = 0; at < w.rows * w.cols; ++at) {
        const int64_t row = at / w.cols, column = at % w.cols;
        GOSSAMER_CHECK((row < place.rows && column < place.cols) || !is_nonzero(values[at]),
                       "BlockSparse: block ", block, " holds a number that is not 0 at row ", row,
                       ", column ", column, ", which is padding: of this block the weight has ",
                       place.rows, " x ", place.cols);
      }
    });
  });
}

}  // namespace gossamer::blocksparse
