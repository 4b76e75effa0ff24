// The body of one instruction set: included once by each <isa>.cpp, which defines TABLE, NAME and the vector width.
#include "simd.inl"
#include "bfloat16.inl"
#include "tile.inl"
#include "panel.inl"
#include "columns.inl"
#include "streams.inl"
#include "transposed.inl"
#include "temporal_columns.inl"
#include "temporal_conv.inl"
#include "pointwise_backward.inl"
#include "adjacency.inl"
#include "graph_conv.inl"
#include "group_lasso.inl"
#include "small_product.inl"
#include "sample_graphs.inl"
#include "graph_product.inl"
#include "dynamic_math.inl"
#include "dynamic_wide.inl"
#include "dynamic_aa.inl"
#include "dynamic_ctr.inl"
#include "norm.inl"
#include "attend.inl"
#include "means.inl"
#include "block_rows.inl"
#include "block_forward.inl"
#include "normed_backward.inl"
#include "dynamic_dg.inl"
#include "block_backward.inl"
#include "pool.inl"
#include "branches.inl"
#include "fused.inl"
#include "fused_columns.inl"
#include "fused_product.inl"
#include "fused_branches.inl"
#include "fused_ctr.inl"
#include "fused_inputs.inl"
#include "fused_dg.inl"
#include "fused_aa.inl"
#include "peak.inl"

template <class S, class A>
constexpr Convolutions<S, A> convolutions() {
  return {temporal_forward<S, A>, temporal_dx<S, A>, temporal_dw<S, A>, pointwise_backward<S, A>, graph_forward<S, A>,
          graph_dx<S, A>, graph_dw<S, A>, sample_graph_forward<S, A>, sample_graph_dx<S, A>, sample_graph_dw<S, A>};
}

template <class S>
constexpr Ops<S> ops() {
  return {convolutions<S, S>(), graph_product<S>, graph_product_backward<S>, sample_product<S>,
          sample_product_backward<S>, lasso_square<S>, lasso_gradient<S>,
          aa_graphs<S>,        aa_graphs_backward<S>, aa_unit_graphs<S>, aa_unit_graphs_backward<S>, ctr_forward<S>, ctr_backward<S>, dg_forward<S>, dg_backward<S>,
          norm_forward<S>,     norm_backward<S>, attend_forward<S>,   attend_backward<S>, pool_forward<S>, pool_backward<S>,
          frame_mean<S>, total_of<S>, append_mean<S>, append_mean_backward<S>, spread_mean<S>, spread_mean_backward<S>,
          block_forward<S>,    block_backward<S>, branches_forward<S>, branches_backward<S>};
}
