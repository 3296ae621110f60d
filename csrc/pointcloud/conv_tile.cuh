#pragma once
// What the convolutions share: where a thread block stands in the table of outputs, the taps it
// visits, and how their rows of x and weights come into shared memory.
#include "common/launch.cuh"
#include "common/pieces.cuh"
#include "pointcloud/conv_cuda.h"

namespace gossamer::pointcloud {

constexpr int kWarp = 32;

template <class T>  // as storage
struct ConvOperands {
  OutputTable table;
  int c_in, c_out;
  const T *x, *weights;
  int64_t x_stride;
  const void* bias;
  void* y;
  Activation activation;
  bool x_pieces, w_pieces;  // whether they can be copied by 16 bytes
};

template <class T>
ConvOperands<T> operands_of(const CudaConvArgs& conv) {
  const auto *x = static_cast<const T*>(conv.x), *w = static_cast<const T*>(conv.weights);
  return {conv.table,
          static_cast<int>(conv.c_in),
          static_cast<int>(conv.c_out),
          x,
          w,
          conv.x_stride,
          conv.bias,
          conv.y,
          conv.activation,
          in_pieces<T>(x, conv.x_stride, conv.c_in),
          in_pieces<T>(w, conv.c_out, conv.c_out)};
}

// Blocks of the same rows follow each other, so that the L2 has these for all but the first.
struct OutputTile {
  int64_t group;
  int first_row;     // of the group
  int first_output;  // the channel

  __device__ OutputTile(int rows, int outputs, int c_out) {
    const unsigned columns = static_cast<unsigned>(c_out + outputs - 1) / outputs;
    const unsigned tile = blockIdx.x / columns, in_group = kGroupRows / rows;
    group = tile / in_group;
    first_row = static_cast<int>(tile % in_group) * rows;
    first_output = static_cast<int>(blockIdx.x - tile * columns) * outputs;
  }
  __device__ int64_t position() const { return group * kGroupRows + first_row; }
};

// The taps that rows of a tile have, in ascending order, the same for all threads.
class Visits {
 public:
  __device__ Visits(const OutputTable& table, const OutputTile& tile, int rows)
      : visited_(table.visited),
        taps_(static_cast<unsigned>(table.taps)),
        mine_((1u << (rows / kQuarterRows)) - 1),
        shift_(tile.first_row / kQuarterRows) {
    const auto most = static_cast<int>(table.visits);
    at_ = min(max(table.begins[tile.group], 0), most);
    end_ = min(max(table.begins[tile.group + 1], 0), most);
    step();
  }

  struct Visit {
    int tap;
    unsigned quarters;  // of the tile, which have it; 0 after the last
  };
  __device__ Visit next() const { return next_; }
  __device__ void step() {
    next_ = {0, 0};
    while (next_.quarters == 0 && at_ < end_) {
      const auto entry = static_cast<unsigned>(visited_[at_++]);
      const unsigned tap = entry >> kQuarters;
      if (tap < taps_) next_ = {static_cast<int>(tap), entry >> shift_ & mine_};
    }
  }

 private:
  const int32_t* visited_;
  unsigned taps_, mine_;
  int shift_, at_, end_;
  Visit next_;
};

// A stage: 32 channels of a tap for the tile's rows of x, then its weights.
template <class T, int kRows, int kOutputs>
struct ConvStage {
  static constexpr int kEach = 16 / sizeof(T);
  static constexpr int kXPieces = kStageChannels / kEach, kWPieces = kOutputs / kEach;  // of a row
  static constexpr int kX = kRows * kXPieces, kW = kStageChannels * kWPieces;
  static constexpr int kPieces = kX + kW;
};

// What it holds, in eight bits: the quarters with something in it, and whether it has more than 16
// channels. 0 after the last.
constexpr unsigned kBothHalves = 1u << kQuarters;

template <class T, int kRows, int kOutputs, int kThreads>
class ConvLoader {
  using Stage = ConvStage<T, kRows, kOutputs>;
  static constexpr int kMyRows = Stage::kX / kThreads, kMyWeights = Stage::kW / kThreads;
  static_assert(Stage::kX % kThreads == 0 && Stage::kW % kThreads == 0);

 public:
  __device__ ConvLoader(const ConvOperands<T>& args, uint4* stages, const OutputTile& tile)
      : args_(args),
        stages_(stages),
        position_(tile.position()),
        first_output_(tile.first_output),
        visits_(args.table, tile, kRows),
        channel_(args.c_in) {
    ask();
  }

  // Fills a stage with what follows, and says what it holds.
  __device__ unsigned load(int stage) {
    if (channel_ >= args_.c_in) {
      here_ = visits_.next();
#pragma unroll
      for (int i = 0; i < kMyRows; ++i) rows_[i] = next_rows_[i];
      visits_.step();
      ask();
      channel_ = 0;
    }
    unsigned holds = 0;
    if (here_.quarters != 0) {
      const int channels = min(args_.c_in - channel_, kStageChannels);
      holds = here_.quarters | (channels > 16 ? kBothHalves : 0u);
      uint4* x = stages_ + stage * Stage::kPieces;
      fill_x(x, channels);
      fill_weights(x + Stage::kX, channels);
      channel_ += kStageChannels;
    }
    ptx::cp_async_commit();  // also an empty group: waits count groups
    return holds;
  }

 private:
  static __device__ int my_piece() { return static_cast<int>(threadIdx.x) % Stage::kXPieces; }
  static __device__ int my_row(int i) {
    return static_cast<int>(threadIdx.x) / Stage::kXPieces + i * (kThreads / Stage::kXPieces);
  }

  // For the rows of x that this thread copies for the tap that follows: they are there when it is
  // that tap's turn.
  __device__ void ask() {
    if (visits_.next().quarters == 0) return;
    const int32_t* rows =
        args_.table.neighbours + position_ + visits_.next().tap * (args_.table.groups * kGroupRows);
#pragma unroll
    for (int i = 0; i < kMyRows; ++i) next_rows_[i] = rows[my_row(i)];
  }

  __device__ void fill_x(uint4* x, int channels) {
    const int piece = my_piece(), bytes = bytes_of<sizeof(T)>(channels, piece);
    const T* from = args_.x + channel_ + Stage::kEach * piece;
#pragma unroll
    for (int i = 0; i < kMyRows; ++i) {
      const bool there =
          bytes > 0 && static_cast<unsigned>(rows_[i]) < static_cast<unsigned>(args_.table.n_in);
      fill(x + place_of<Stage::kXPieces>(my_row(i), piece),
           there ? from + rows_[i] * args_.x_stride : args_.x, there ? bytes : 0, args_.x_pieces);
    }
  }

  __device__ void fill_weights(uint4* w, int channels) {
    const int64_t first = int64_t{here_.tap} * args_.c_in + channel_;
    const T* from = args_.weights + first * args_.c_out + first_output_;
#pragma unroll
    for (int i = 0; i < kMyWeights; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      const int row = at / Stage::kWPieces, piece = at % Stage::kWPieces;
      const int bytes =
          row < channels ? bytes_of<sizeof(T)>(args_.c_out - first_output_, piece) : 0;
      fill(w + place_of<Stage::kWPieces>(row, piece),
           bytes > 0 ? from + row * args_.c_out + Stage::kEach * piece : args_.weights, bytes,
           args_.w_pieces);
    }
  }

  const ConvOperands<T>& args_;
  uint4* stages_;
  int64_t position_;
  int first_output_;
  Visits visits_;
  Visits::Visit here_{0, 0};
  int channel_;  // the next of the tap, or past its last
  int rows_[kMyRows] = {}, next_rows_[kMyRows] = {};
};

}  // namespace gossamer::pointcloud
